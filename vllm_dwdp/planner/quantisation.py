"""How many bits each kind of weight takes, from the quantisation that a config.json describes.

Understands the forms that checkpoints of MoE models use: `fp8` (per tensor, or in blocks), `mxfp4`,
ModelOpt's `NVFP4` and `FP8`, `compressed-tensors` (config groups and their targets), `awq` and `gptq`.
What a checkpoint leaves out of it (`ignore`, `ignored_layers`, `modules_to_not_convert`,
`exclude_modules`) stays in 16 bits: the names of a layer's modules are looked up there, layer by layer,
so that a kind may have several formats.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.planner.checked import shown, whole
from vllm_dwdp.planner.module_names import ModuleNames, names_of

_LISTS = ("ignore", "ignored_layers", "modules_to_not_convert", "exclude_modules")


@dataclass(frozen=True, kw_only=True)
class Format:
    """How a weight is stored, and what its products run in.

    Args:
        bits: of a weight, its scales included.
        activation_bits: 4 or 8 where activations are quantised too; 16 where the kernel dequantises
            the weights (weight-only formats).
    """

    bits: float
    activation_bits: int = 16


FORMATS: Mapping[str, Format] = {
    "bf16": Format(bits=16.0),
    "fp16": Format(bits=16.0),
    "fp8": Format(bits=8.0, activation_bits=8),
    "int8": Format(bits=8.0, activation_bits=8),
    "int4": Format(bits=4.125),  # one 16-bit scale for 128 values; AWQ and GPTQ, weights only
    "mxfp4": Format(bits=4.25, activation_bits=4),  # one 8-bit scale for 32 values
    "nvfp4": Format(bits=4.5, activation_bits=4),  # one 8-bit scale for 16 values
}


UNQUANTISED = FORMATS["bf16"]


BLOCKS_OF_FP4 = Format(bits=FORMATS["mxfp4"].bits, activation_bits=8)
"""DeepSeek-V4's experts: weights in MXFP4, activations in FP8."""


@dataclass(frozen=True)
class Precision:
    """The formats of one kind of weight.

    Args:
        parts: each format, and its share of the layers; the shares add up to one.
    """

    parts: tuple[tuple[Format, float], ...]

    @classmethod
    def of(cls, form: Format) -> "Precision":
        """Use one format in every layer."""
        return cls(((form, 1.0),))

    @property
    def bits(self) -> float:
        """The bits of a weight, in the mean over the layers."""
        return sum(form.bits * share for form, share in self.parts)


@dataclass(frozen=True)
class Quantisation:
    """What `quantization_config` says.

    Args:
        config: the entry of config.json, or `hf_quant_config.json`'s; empty if nothing is quantised.
        experts: DeepSeek-V4's name of another format that experts have: "fp4".
    """

    config: Mapping[str, Any]
    experts: str = ""

    @classmethod
    def of(cls, entry: Any, experts: str = "") -> "Quantisation":
        """Read the entry of config.json; None if it has none.

        Raises:
            DwdpConfigError: it is no object.
        """
        if not isinstance(entry, dict | None):
            raise DwdpConfigError(
                f"quantization_config of config.json is {shown(entry)}; it must be an object."
            )
        return cls(entry or {}, experts)

    def precision(self, kind: str, layers: Sequence[int]) -> Precision:
        """Return the formats of a kind of weight, a key of `KINDS`.

        Args:
            layers: that have this kind.

        Raises:
            DwdpConfigError: the form is unknown.
        """
        if not self.config or not layers:
            return Precision.of(UNQUANTISED)
        counts = Counter(self._format(kind, layer) for layer in layers)
        return Precision(tuple((form, count / len(layers)) for form, count in counts.items()))

    @property
    def kv_bits(self) -> float:
        """The bits of an element of the KV cache, as the checkpoint asks."""
        if "fp8" in str(self.config.get("kv_cache_quant_algo", "")).lower():
            return 8.0
        scheme = self.config.get("kv_cache_scheme")
        bits = scheme.get("num_bits") if isinstance(scheme, dict) else None
        return UNQUANTISED.bits if bits is None else float(_bits("kv_cache_scheme.num_bits", bits))

    def _format(self, kind: str, layer: int) -> Format:
        if kind == "experts" and self._own_experts:
            return self._own_experts
        names = names_of(kind, layer)
        if self._kept.has(names):
            return UNQUANTISED
        if not self._groups:
            return self._whole
        found = [form for targets, form in self._groups if targets.covers(kind, names)]
        return found[0] if found else UNQUANTISED

    @cached_property
    def _own_experts(self) -> Format | None:
        """The format of experts, where it is not that of the other weights."""
        if "nvfp4" in str(self.config.get("moe_quant_algo", "")).lower():
            return FORMATS["nvfp4"]
        return BLOCKS_OF_FP4 if self.experts == "fp4" else None

    @cached_property
    def _kept(self) -> ModuleNames:
        listed = [self.config.get(name) for name in _LISTS]
        return ModuleNames(
            tuple(str(name) for names in listed if isinstance(names, list) for name in names)
        )

    @cached_property
    def _whole(self) -> Format:
        """The format of everything that is quantised, where there are no groups."""
        return self._read({}, is_group=False)

    @cached_property
    def _groups(self) -> list[tuple[ModuleNames, Format]]:
        """The groups of compressed-tensors: what each covers, and in which format."""
        groups = self.config.get("config_groups")
        entries = groups.values() if isinstance(groups, dict) else ()
        return [
            (_targets(group), self._read(group, is_group=True))
            for group in entries
            if isinstance(group, dict) and isinstance(group.get("weights"), dict)
        ]

    def _read(self, group: Mapping[str, Any], is_group: bool) -> Format:
        weights = group.get("weights", {})
        inputs = group.get("input_activations")
        method = str(self.config.get("quant_method", "")).lower()
        words = (
            method,
            self.config.get("quant_algo"),
            self.config.get("format"),
            group.get("format"),
        )
        text = " ".join(str(word) for word in words).lower()
        for name in ("mxfp4", "nvfp4"):
            if name in text:
                is_weight_only = is_group and inputs is None
                return Format(bits=FORMATS[name].bits, activation_bits=16 if is_weight_only else 4)
        given = (weights.get("num_bits"), self.config.get("bits"), self.config.get("w_bit"))
        bits = next((value for value in given if value is not None), None)
        if bits is not None:
            scale = _scale_bits(weights.get("group_size") or self.config.get("group_size"))
            return Format(
                bits=_bits("bits", bits) + scale, activation_bits=_activation_bits(inputs)
            )
        if "fp8" in text:
            return Format(bits=8.0 + self._block_bits(), activation_bits=8)
        raise DwdpConfigError(
            f"quantization_config of config.json has quant_method {shown(method or 'none')}, which the "
            f"planner does not know. Give both --expert-dtype and --dense-dtype ({', '.join(FORMATS)})."
        )

    def _block_bits(self) -> float:
        """Count the bits of the scales of fp8 in blocks, per weight."""
        block = self.config.get("weight_block_size")
        if not isinstance(block, list) or len(block) != 2:
            return 0.0
        sizes = [_entry("weight_block_size", size) for size in block]
        return 32.0 / (sizes[0] * sizes[1])


def _targets(group: Mapping[str, Any]) -> ModuleNames:
    """Return what a group covers: every linear layer, if it does not say."""
    targets = group.get("targets")
    return ModuleNames(tuple(map(str, targets)) if isinstance(targets, list) else ("Linear",))


def _activation_bits(inputs: Any) -> int:
    bits = inputs.get("num_bits") if isinstance(inputs, dict) else None
    if bits is None:
        return 16
    exact = _bits("input_activations.num_bits", bits)
    return 4 if exact <= 4 else 8 if exact <= 8 else 16


def _scale_bits(group_size: Any) -> float:
    """Count the bits of a 16-bit scale per group; -1 is one per channel, which is next to none."""
    if group_size in (None, -1):
        return 0.0
    return 16.0 / _entry("group_size", group_size)


def _bits(name: str, value: Any) -> int:
    return _entry(name, value, 32)


def _entry(name: str, value: Any, high: int | None = None) -> int:
    return whole(f"quantization_config of config.json: {name}", value, 1, high)
