"""What a family is, and how a small checkpoint of it is written."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from gpu_checks.families import EXPERTS, HEADS
from vllm_dwdp.entrypoints.bench.checkpoints import DONE, save_tokenizer

Shapes = dict[str, tuple[int, ...]]
Fields = dict[str, Any]

CONFIGURATION = """from transformers import CONFIG_MAPPING, PretrainedConfig

PARTS = ("text_config", "llm_config", "vision_config")


def config_of(fields):
    known = fields.get("model_type") in CONFIG_MAPPING
    return (CONFIG_MAPPING[fields["model_type"]] if known else PretrainedConfig)(**fields)


class OwnConfig(PretrainedConfig):
    model_type = "{model_type}"

    def __init__(self, **fields):
        parts = {{part: config_of(fields.pop(part)) for part in PARTS if part in fields}}
        for part, config in parts.items():
            setattr(self, part, config)
        super().__init__(**fields)
"""

COMMON: Fields = (
    HEADS | EXPERTS | {"hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
)
GROUPED: Fields = {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.5}


@dataclass(frozen=True, kw_only=True)
class Published:
    """A family.

    Args:
        architecture, model_type: in config.json.
        experts: the field that counts them; empty if `fields` does, kind by kind.
        fields: others, beside `COMMON`.
        tensors: names and shapes, of the fields; None if nothing reads them.
        has_own_configuration: the checkpoint brings the class of its config.
        without: names in `COMMON` that the family does not have.
        inside: the field that holds all of these, of a family with a text model in it.
        besides: what config.json has beside that field.
        tokens: that its tokenizer has.
        files: others of the checkpoint, by name.
        config_name, weights_name: of the files; Mistral has others.
    """

    architecture: str
    model_type: str
    experts: str
    fields: Fields
    tensors: Callable[[Fields], Shapes] | None = None
    has_own_configuration: bool = True
    without: tuple[str, ...] = ()
    inside: str = ""
    besides: Fields = field(default_factory=dict)
    tokens: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)
    config_name: str = "config.json"
    weights_name: str = "model.safetensors"

    def config(self, num_experts: int, overrides: Fields) -> Fields:
        """Return the content of config.json."""
        common = {name: value for name, value in COMMON.items() if name not in self.without}
        counted = {self.experts: num_experts} if self.experts else {}
        text = common | self.fields | counted
        mapped = {"auto_map": {"AutoConfig": "configuration.OwnConfig"}}
        return (
            {"architectures": [self.architecture], "model_type": self.model_type}
            | (mapped if self.has_own_configuration else {})
            | ({self.inside: text} if self.inside else text)
            | self.besides
            | overrides
        )

    def text(self, config: Fields) -> Fields:
        """Return the part of config.json that the text model reads."""
        found: Fields = config[self.inside] if self.inside else config
        return found


TABLE = ".tid2eid"
"""The end of the name of what holds experts, of which there are `num_experts`, and no weights."""


def write_published(
    folder: Path, family: Published, num_experts: int, seed: int, **overrides: Any
) -> Path:
    """Write config, configuration, tokenizer and random bf16 weights; one that is there is kept."""
    done = folder / DONE
    if done.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = family.config(num_experts, overrides)
    (folder / family.config_name).write_text(json.dumps(config, indent=2))
    if family.has_own_configuration:
        code = CONFIGURATION.format(model_type=family.model_type)
        (folder / "configuration.py").write_text(code)
    for name, content in family.files.items():
        (folder / name).write_text(content)
    save_tokenizer(folder)
    if family.tokens:
        add_tokens(folder, family.tokens)
    if family.tensors is not None:
        dice = torch.Generator().manual_seed(seed)
        shapes = family.tensors(family.text(config))
        tensors = {
            name: torch.randint(num_experts, shape, generator=dice, dtype=torch.int32)
            if name.endswith(TABLE)
            else _random(name, shape, dice)
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / family.weights_name, {"format": "pt"})
    done.touch()
    return folder


def add_tokens(folder: Path, tokens: Sequence[str]) -> None:
    """Let the tokenizer of a checkpoint know further tokens, e.g. those for images."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    tokenizer.save_pretrained(folder)


def _random(name: str, shape: tuple[int, ...], dice: torch.Generator) -> torch.Tensor:
    """Return weights by which every expert and every token visibly changes the output."""
    if len(shape) == 1 and "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    scale = 0.15 if "expert" in name or "mlp" in name or "moe" in name else 0.08
    return (torch.randn(shape, generator=dice) * scale).to(torch.bfloat16)
