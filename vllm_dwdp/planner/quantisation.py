"""How many bits each kind of weight takes, from the quantisation that a config.json describes.

Understands the forms that checkpoints of MoE models use: `fp8` (per tensor, or in blocks), `mxfp4`,
ModelOpt's `NVFP4` and `FP8`, `compressed-tensors` (config groups), `awq` and `gptq`. What a checkpoint
leaves out of it (`ignore`, `ignored_layers`, `modules_to_not_convert`, `exclude_modules`) stays in 16
bits: the names of a layer's modules are looked up there, layer by layer, so a partly converted kind
has bits in between.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from vllm_dwdp.errors import DwdpConfigError

BITS = {
    "bf16": 16.0,
    "fp16": 16.0,
    "fp8": 8.0,
    "int8": 8.0,
    "int4": 4.125,  # one 16-bit scale for 128 values
    "mxfp4": 4.25,  # one 8-bit scale for 32 values
    "nvfp4": 4.5,  # one 8-bit scale for 16 values
}
UNQUANTISED = 16.0
KINDS: Mapping[str, tuple[str, ...]] = {
    "attention": ("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa",
                  "self_attn.k_proj", "self_attn.o_proj"),
    "experts": ("mlp.experts.0.gate_proj", "mlp.experts.0.down_proj",
                "block_sparse_moe.experts.0.w1", "feed_forward.experts.0.gate_proj"),
    "shared": ("mlp.shared_experts.gate_proj", "mlp.shared_expert.gate_proj",
               "feed_forward.shared_expert.gate_proj"),
    "dense": ("mlp.gate_proj", "mlp.down_proj", "feed_forward.gate_proj"),
}  # fmt: skip
"""Modules that stand for each kind of weight, after `model.layers.N.`; each family has some of them."""
_LISTS = ("ignore", "ignored_layers", "modules_to_not_convert", "exclude_modules")


@dataclass(frozen=True)
class Quantisation:
    """What `quantization_config` says.

    Args:
        config: the entry of config.json, or `hf_quant_config.json`'s; empty if nothing is quantised.
    """

    config: Mapping[str, Any]

    @classmethod
    def of(cls, entry: Any) -> "Quantisation":
        """From the entry of config.json; None if it has none.

        Raises:
            DwdpConfigError: it is no object.
        """
        if not isinstance(entry, dict | None):
            raise DwdpConfigError(
                f"quantization_config of config.json is {str(entry)[:40]!r}; it must be an object."
            )
        return cls(entry or {})

    def bits(self, kind: str, num_layers: int) -> float:
        """Mean bits of a weight of this kind, a key of `KINDS`, its scales included."""
        if not self.config:
            return UNQUANTISED
        kept = sum(self._is_kept(kind, layer) for layer in range(num_layers)) / max(1, num_layers)
        return kept * UNQUANTISED + (1.0 - kept) * self.quantised_bits

    @cached_property
    def quantised_bits(self) -> float:
        """Of a weight that is quantised.

        Raises:
            DwdpConfigError: the form is unknown.
        """
        weights = self._group_weights()
        method = str(self.config.get("quant_method", "")).lower()
        algorithm = str(self.config.get("quant_algo", "")).lower()
        text = f"{method} {algorithm} {self.config.get('format', '')}".lower()
        for name in ("mxfp4", "nvfp4"):
            if name in text:
                return BITS[name]
        bits = weights.get("num_bits") or self.config.get("bits") or self.config.get("w_bit")
        if isinstance(bits, int):
            return bits + _scale_bits(weights.get("group_size") or self.config.get("group_size"))
        if "fp8" in text:
            block = self.config.get("weight_block_size")
            sizes = block if isinstance(block, list) and len(block) == 2 else []
            whole = all(isinstance(size, int) and size > 0 for size in sizes)
            return 8.0 + (32.0 / (sizes[0] * sizes[1]) if sizes and whole else 0.0)
        raise DwdpConfigError(
            f"quantization_config of config.json has quant_method {method or 'none'!r}, which the "
            f"planner does not know. Give the precision with --expert-dtype ({', '.join(BITS)})."
        )

    @property
    def kv_bits(self) -> float:
        """Of an element of the KV cache, as the checkpoint asks."""
        scheme = self.config.get("kv_cache_scheme")
        bits = scheme.get("num_bits") if isinstance(scheme, dict) else None
        if "fp8" in str(self.config.get("kv_cache_quant_algo", "")).lower():
            bits = 8
        return float(bits) if isinstance(bits, int) else UNQUANTISED

    def _group_weights(self) -> Mapping[str, Any]:
        """The weights entry of compressed-tensors' first group."""
        groups = self.config.get("config_groups")
        first: Any = next(iter(groups.values()), {}) if isinstance(groups, dict) else {}
        weights = first.get("weights") if isinstance(first, dict) else None
        return weights if isinstance(weights, dict) else {}

    @cached_property
    def _kept(self) -> tuple[str, ...]:
        listed = [self.config.get(name) for name in _LISTS]
        return tuple(str(name) for names in listed if isinstance(names, list) for name in names)

    def _is_kept(self, kind: str, layer: int) -> bool:
        names = [f"model.layers.{layer}.{module}" for module in KINDS[kind]]
        return any(_matches(pattern, names) for pattern in self._kept)


def _scale_bits(group_size: Any) -> float:
    return 16.0 / group_size if isinstance(group_size, int) and group_size > 0 else 0.0


def _matches(pattern: str, names: Iterable[str]) -> bool:
    """Whether a list entry means one of the modules: a regex, a wildcard, a name or a parent's."""
    if pattern.startswith("re:"):
        try:
            return any(re.match(pattern[3:], name) for name in names)
        except re.error as error:
            raise DwdpConfigError(
                f"quantization_config of config.json leaves out {pattern!r}: {error}."
            ) from error
    pattern = pattern.replace("language_model.model.", "model.")
    pattern = pattern.replace("model.language_model.", "model.")
    if "*" in pattern:
        return any(
            fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for name in names
        )
    if "." not in pattern:
        return any(pattern in name.split(".") for name in names)
    return any(name == pattern or name.startswith(f"{pattern}.") for name in names)
