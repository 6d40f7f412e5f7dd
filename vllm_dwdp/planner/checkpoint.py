"""What a Hugging Face config.json says of a model: its fields, and which layers are of which kind.

Fields are found whatever a family calls them. Quantisation has a module of its own.
"""

import json
from pathlib import Path
from typing import Any

from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.planner.checked import shown, whole

FULL_EVERY = 4
"""One of so many Llama-4 layers sees all keys, where config.json does not say which."""


def read_config(path: Path) -> dict[str, Any]:
    """Read a config.json, or the one in a model folder, and return the text model's part of it.

    Raises:
        DwdpConfigError: it cannot be read, or is no JSON object.
    """
    file = path / "config.json" if path.is_dir() else path
    config = _read_object(file)
    beside = file.with_name("hf_quant_config.json")  # ModelOpt's older exports
    if "quantization_config" not in config and beside.is_file():
        config["quantization_config"] = _read_object(beside).get("quantization")
    inner = config.get("text_config")
    if isinstance(inner, dict):
        config = {key: value for key, value in config.items() if key != "text_config"} | inner
    return config


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DwdpConfigError(f"--model {file}: {error}.") from error
    if not isinstance(content, dict):
        raise DwdpConfigError(f"--model {file}: it must be a JSON object.")
    return content


class ConfigFields:
    """Whole numbers and lists of layers in a config; what is null counts as not given."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
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

    def layers(self, name: str, num_layers: int) -> tuple[int, ...]:
        """Return a list of layer numbers, empty if it is not given.

        Raises:
            DwdpConfigError: it is no list of different layers of the model.
        """
        listed = self.list_of(name)
        for entry in listed:
            whole(f"{self.named(name)}: an entry", entry, 0, num_layers - 1)
        if len(set(listed)) < len(listed):
            raise DwdpConfigError(f"{self.named(name)} names a layer twice: {shown(listed)}.")
        return tuple(sorted(listed))

    def per_layer(self, name: str, num_layers: int) -> list[Any]:
        """Return a list with one entry per layer, empty if it is not given.

        Raises:
            DwdpConfigError: it is no such list.
        """
        listed = self.list_of(name)
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


def moe_layers(fields: ConfigFields, num_layers: int) -> tuple[int, ...]:
    """Find the layers with routed experts.

    Follows the families: `moe_layers` or `interleave_moe_layer_step` (Llama-4), `decoder_sparse_step`
    and `mlp_only_layers` (Qwen), `first_k_dense_replace` and `moe_layer_freq` (DeepSeek, GLM; a
    frequency, or a list of 0 and 1).
    """
    if listed := fields.layers("moe_layers", num_layers):
        return listed
    dense_first = fields.first("first_k_dense_replace", default=0)
    every = fields.first("decoder_sparse_step", "interleave_moe_layer_step", default=1, low=1)
    dense = set(fields.layers("mlp_only_layers", num_layers))
    has_experts = _by_frequency(fields, num_layers)
    return tuple(
        layer
        for layer in range(num_layers)
        if layer >= dense_first
        and (layer + 1) % every == 0
        and has_experts[layer]
        and layer not in dense
    )


def _by_frequency(fields: ConfigFields, num_layers: int) -> list[bool]:
    name = "moe_layer_freq"
    if isinstance(fields.config.get(name), list):
        listed = fields.per_layer(name, num_layers)
        return [bool(whole(f"{fields.named(name)}: an entry", one, 0, 1)) for one in listed]
    frequency = fields.first(name, default=1, low=1)
    return [layer % frequency == 0 for layer in range(num_layers)]


def narrow_layers(fields: ConfigFields, num_layers: int) -> tuple[float, int, bool]:
    """Return the share of layers that see a window or a chunk, its tokens, and whether it is a chunk."""
    types = fields.per_layer("layer_types", num_layers)
    chunk = fields.first("attention_chunk_size", default=0)
    window = fields.first("sliding_window", default=0)
    if types:
        narrow = sum(kind in ("sliding_attention", "chunked_attention") for kind in types)
        is_chunk = bool(chunk) and "chunked_attention" in types
    elif chunk:
        narrow, is_chunk = sum(_rotary_layers(fields, num_layers)), True
    else:
        narrow, is_chunk = 0, False
    size = chunk if is_chunk else window or chunk
    return (narrow / num_layers, size, is_chunk) if size and narrow else (0.0, 0, False)


def _rotary_layers(fields: ConfigFields, num_layers: int) -> list[bool]:
    """Say which Llama-4 layers have a rotary embedding: these see a chunk. The list says 1 for them."""
    name = "no_rope_layers"
    if listed := fields.per_layer(name, num_layers):
        return [bool(whole(f"{fields.named(name)}: an entry", one, 0, 1)) for one in listed]
    every = fields.first("no_rope_layer_interval", default=FULL_EVERY, low=1)
    return [(layer + 1) % every != 0 for layer in range(num_layers)]
