"""What a Hugging Face config.json says of a model: its fields, and which layers have experts.

Fields are found whatever a family calls them. Quantisation has a module of its own.
"""

import json
from pathlib import Path
from typing import Any

from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.planner.checked import shown, whole
from vllm_dwdp.planner.mistral import common_names

NUM_KINDS = 2
"""Kinds of experts that a layer of ERNIE-VL has; its config has a list of so many for each field."""


def read_config(path: Path) -> dict[str, Any]:
    """Read a config.json, or the one in a model folder, and return the text model's part of it.

    Where a folder has none, Mistral's params.json is read.

    Raises:
        DwdpConfigError: it cannot be read, or is no JSON object.
    """
    file = path / "config.json" if path.is_dir() else path
    params = file.with_name("params.json")
    if not file.exists() and params.is_file():
        return common_names(_read_object(params))
    config = _read_object(file)
    beside = file.with_name("hf_quant_config.json")  # ModelOpt's older exports
    if "quantization_config" not in config and beside.is_file():
        config["quantization_config"] = _read_object(beside).get("quantization")
    return _text_model(config)


TEXT_MODELS = ("thinker_config", "llm_config", "text_config")
"""What configs of multimodal models call the part that is their text model, or that holds it."""


def _text_model(config: dict[str, Any]) -> dict[str, Any]:
    """Return the text model's fields over those of the config that it is a part of."""
    for name in TEXT_MODELS:
        inner = config.get(name)
        if isinstance(inner, dict):
            around = {key: value for key, value in config.items() if key != name}
            return _text_model(around | inner)
    return config


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DwdpConfigError(f"--model {file}: {error}.") from error
    if not isinstance(content, dict):
        raise DwdpConfigError(f"--model {file}: it must be a JSON object.")
    return content


DBRX_NAMES = {
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_layers": "num_hidden_layers",
    "kv_n_heads": "num_key_value_heads",
    "ffn_hidden_size": "intermediate_size",
}
"""DBRX' names of common fields."""


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config with DBRX' nested parts, and their names, brought to the common form."""
    parts = [config.get("attn_config"), config.get("ffn_config")]
    if not all(isinstance(part, dict) for part in parts):
        return config
    named = config | parts[0] | parts[1]  # type: ignore[operator]
    return {DBRX_NAMES.get(name, name): value for name, value in named.items()} | {
        "model_type": config.get("model_type")
    }


class ConfigFields:
    """Whole numbers and lists of layers in a config; what is null counts as not given."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = _flat(config)
        self.model_type = str(config.get("model_type", ""))
        self.architecture = self._architecture()

    def _architecture(self) -> str:
        names = self.config.get("architectures")
        if names is None or names == []:
            return self.model_type or "model"
        if isinstance(names, list) and isinstance(names[0], str):
            return names[0]
        raise DwdpConfigError(
            f"architectures in config.json is {shown(names)}; it must be a list of names."
        )

    def named(self, name: str) -> str:
        """Name a field in a message."""
        return f"{self.architecture}: {name} in config.json"

    def first(self, *names: str, default: int | None = None, low: int | None = None) -> int:
        """Return the first of these that is given.

        Args:
            default: if none is given.
            low: the smallest allowed; 1, or 0 where there is a default.

        Raises:
            DwdpConfigError: it is no whole number of at least `low`, or none is given.
        """
        smallest = low if low is not None else int(default is None)
        for name in names:
            value = self.config.get(name)
            if value is not None:
                return whole(self.named(name), value, smallest)
        if default is None:
            raise DwdpConfigError(f"{self.architecture}: config.json has no {' or '.join(names)}.")
        return default

    def most(self, *names: str, default: int | None = None) -> int:
        """Return the first of these that is given; of a list (one number per layer or kind) the largest.

        Raises:
            DwdpConfigError: as `first`.
        """
        for name in names:
            value = self.config.get(name)
            if isinstance(value, list) and value:
                return max(whole(f"{self.named(name)}: an entry", each, 0) for each in value)
            if value is not None:
                return self.first(name, default=default)
        return self.first(*names, default=default)

    def of_kind(self, kind: int, *names: str, default: int | None = None) -> int:
        """Return the first of these that is given; where there are two kinds of experts, that of `kind`.

        Other lists have an entry per layer, of which the largest counts.

        Raises:
            DwdpConfigError: as `first`.
        """
        for name in names:
            value = self.config.get(name)
            if self.has_two_kinds and isinstance(value, list) and len(value) == NUM_KINDS:
                return whole(f"{self.named(name)}: an entry", value[kind], 0)
        return self.most(*names, default=default)

    @property
    def has_two_kinds(self) -> bool:
        """Whether a layer has experts for text and others for pictures, as ERNIE-VL's."""
        counts = self.config.get("moe_num_experts")
        return isinstance(counts, list) and len(counts) == NUM_KINDS

    @property
    def num_layers(self) -> int:
        """The number of layers; NemotronH lists them only."""
        for name in ("layers_block_type", "hybrid_override_pattern"):
            if self.config.get("num_hidden_layers") is None and self.config.get(name):
                return len(self.config[name])
        return self.first("num_hidden_layers", "num_layers")

    def num_banks(self, num_expert_layers: int) -> int:
        """Return how many sets of experts so many layers have; Intern-S2-Mobius' take turns at a few."""
        return min(num_expert_layers, self.first("num_blocks", default=0) or num_expert_layers)

    @property
    def attentions_per_layer(self) -> int:
        """How often a layer attends; LongCat's do twice, with a feed-forward after each."""
        return 2 if self.model_type.startswith("longcat_flash") else 1

    def layers(self, name: str, num_layers: int) -> tuple[int, ...]:
        """Return a list of layer numbers, empty if it is not given; Step writes it as a text.

        Raises:
            DwdpConfigError: it is no list of different layers of the model.
        """
        value = self.config.get(name)
        parts = value.split(",") if isinstance(value, str) else []
        is_text = bool(parts) and all(part.strip().isdecimal() for part in parts)
        listed = [int(part) for part in parts] if is_text else self.list_of(name)
        for entry in listed:
            whole(f"{self.named(name)}: an entry", entry, 0, num_layers - 1)
        if len(set(listed)) < len(listed):
            raise DwdpConfigError(f"{self.named(name)} names a layer twice: {shown(listed)}.")
        return tuple(sorted(listed))

    def per_layer(self, name: str, num_layers: int) -> list[Any]:
        """Return a list with one entry per layer, empty if it is not given.

        Further entries, of the layers beside the model that predict more tokens, are left out.

        Raises:
            DwdpConfigError: it is no such list.
        """
        listed = self.list_of(name)
        if len(listed) == num_layers + self.first("num_nextn_predict_layers", default=0):
            listed = listed[:num_layers]
        if listed and len(listed) != num_layers:
            raise DwdpConfigError(
                f"{self.named(name)} has {len(listed)} entries; it must have one for each of the "
                f"{num_layers} layers."
            )
        return listed

    def list_of(self, name: str) -> list[Any]:
        """Return a list, empty if it is not given.

        Raises:
            DwdpConfigError: it is something else.
        """
        value = self.config.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise DwdpConfigError(f"{self.named(name)} is {shown(value)}; it must be a list.")
        return value


def moe_layers(fields: ConfigFields, num_layers: int, kind: int = 0) -> tuple[int, ...]:
    """Find the layers with routed experts, where there are two kinds those of `kind`.

    Follows the families: `moe_layers` or `interleave_moe_layer_step` (Llama-4), `moe_layers_enum`
    (Step), `decoder_sparse_step` and `mlp_only_layers` (Qwen), `first_k_dense_replace` and
    `moe_layer_freq` (DeepSeek, GLM; a frequency, or a list of 0 and 1), `mlp_layer_types` (as
    transformers writes them), the kinds of NemotronH's layers, `expert_layer_period` (Jamba),
    `moe_layer_start_index` (ERNIE), `num_dense_layers` (LFM2), `dense_mlp_idx` (Inkling).
    """
    for name in ("moe_layers", "moe_layers_enum"):
        if listed := fields.layers(name, num_layers):
            return listed
    if types := fields.per_layer("mlp_layer_types", num_layers):
        return tuple(layer for layer, kind in enumerate(types) if kind != "dense")
    for name in ("layers_block_type", "hybrid_override_pattern"):
        kinds = fields.config.get(name) or ()
        if found := tuple(layer for layer, kind in enumerate(kinds) if kind in ("moe", "E")):
            return found
    layers = range(num_layers)
    return tuple(layer for layer in layers if _has_experts(fields, layer, num_layers, kind))


def _has_experts(fields: ConfigFields, layer: int, num_layers: int, kind: int) -> bool:
    first_names = ("first_k_dense_replace", "num_dense_layers", "dense_mlp_idx")
    dense_first = fields.first(*first_names, default=0)
    steps = ("decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_interval")
    period = fields.first("expert_layer_period", default=1, low=1)
    return (
        layer >= max(dense_first, fields.of_kind(kind, "moe_layer_start_index", default=0))
        and layer <= fields.of_kind(kind, "moe_layer_end_index", default=num_layers)
        and (layer + 1) % fields.first(*steps, default=1, low=1) == 0
        and layer % period == fields.first("expert_layer_offset", default=0) % period
        and _by_frequency(fields, num_layers)[layer]
        and layer not in fields.layers("mlp_only_layers", num_layers)
    )


def _by_frequency(fields: ConfigFields, num_layers: int) -> list[bool]:
    name = "moe_layer_freq"
    if isinstance(fields.config.get(name), list):
        listed = fields.per_layer(name, num_layers)
        return [bool(whole(f"{fields.named(name)}: an entry", one, 0, 1)) for one in listed]
    frequency = fields.first(name, default=1, low=1)
    return [layer % frequency == 0 for layer in range(num_layers)]
