"""A Hugging Face config.json as it is on disk, and its fields whatever a family calls them."""

from pathlib import Path
from typing import Any

from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.planner.checked import MOST_OF_ANYTHING, parse_json, shown, whole


def read_config(path: Path) -> dict[str, Any]:
    """A config.json, or the one in a model folder; the text model's part of it.

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
        content = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DwdpConfigError(f"--model {file}: {error}.") from error
    if not isinstance(content, dict):
        raise DwdpConfigError(f"--model {file}: it must be a JSON object.")
    return content


class ConfigFields:
    """Whole numbers of a config, and lists of layers; what is null is not given."""

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
        """A field, for a message."""
        return f"{self.architecture}: {name} in config.json"

    def first(
        self,
        *names: str,
        default: int | None = None,
        low: int | None = None,
        high: int = MOST_OF_ANYTHING,
    ) -> int:
        """The first of these that is given.

        Args:
            default: if none is given.
            low, high: bounds of what is given; `low` is 1, or 0 where there is a default.

        Raises:
            DwdpConfigError: it is no whole number in its bounds, or none is given.
        """
        smallest = low if low is not None else int(default is None)
        for name in names:
            value = self.config.get(name)
            if value is not None:
                return whole(self.named(name), value, smallest, high)
        if default is None:
            raise DwdpConfigError(f"{self.architecture}: config.json has no {' or '.join(names)}.")
        return default

    def layers(self, name: str, num_layers: int) -> tuple[int, ...]:
        """A list of layer numbers; empty if it is not given.

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
        """A list with one entry per layer; empty if it is not given.

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
        """A list; empty if it is not given.

        Raises:
            DwdpConfigError: it is something else.
        """
        value = self.config.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise DwdpConfigError(f"{self.named(name)} is {shown(value)}; it must be a list.")
        return value
