"""A weight transfer for tests: the trainer names files, as vLLM's own engines name handles of a GPU.

vLLM's engines need NCCL or CUDA memory, so none runs on a CPU. This one loads what it is told to by the
same calls: a layerwise reload begins, `load_weights` gets checkpoint tensors, the reload ends.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

NAME = "files"
ROOT = Path(__file__).parents[2]
PLUGINS = Path(__file__).with_name("transfer_plugins")


def environment() -> dict[str, str]:
    """Return what makes a started program and all its engines' processes `register` too, as a plugin."""
    places = [str(ROOT), str(PLUGINS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(places)}


@dataclass
class NoInit(WeightTransferInitInfo):
    """Nothing to agree on."""


@dataclass
class Files(WeightTransferUpdateInfo):
    """Which tensors of a checkpoint are sent: those whose name contains one of `parts`, or all."""

    folder: str
    parts: list[str] = field(default_factory=lambda: [""])
    in_place: bool = False


class FileTransfer(WeightTransferEngine[NoInit, Files]):
    """Loads named tensors of a checkpoint."""

    init_info_cls = NoInit
    update_info_cls = Files

    def init_transfer_engine(self, init_info: NoInit) -> None:
        """Nothing to do."""

    def start_weight_update(self) -> None:
        """As vLLM's engines for checkpoint tensors."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Files) -> None:
        """Load them; `in_place` past the model."""
        if update_info.in_place:
            return
        self.model.load_weights(read(Path(update_info.folder), update_info.parts))

    def update_weights(self, update_info: dict[str, object]) -> None:
        """Without an accelerator to wait for."""
        self.receive_weights(self.parse_update_info(update_info))

    def finish_weight_update(self) -> None:
        """As vLLM's engines for checkpoint tensors."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing is held."""


def read(folder: Path, parts: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                if any(part in name for part in parts):
                    yield name, file.get_tensor(name)


def register() -> None:
    """Make it known to vLLM under `NAME`, once."""
    if NAME not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(NAME, FileTransfer)


def parts_of(model: str) -> list[list[str]]:
    """Return a way to cut a checkpoint into two chunks: by layers."""
    layers = json.loads((Path(model) / "config.json").read_text())["num_hidden_layers"]
    return [
        ["embed", *(f"layers.{n}." for n in range(0, layers, 2))],
        ["model.norm", "lm_head", *(f"layers.{n}." for n in range(1, layers, 2))],
    ]


def checksums(worker: Any) -> dict[str, Any]:
    """Return what `/weight_checker` says of a worker's weights, by name; for `report`."""
    found = worker.compute_weight_checksums()
    return {"checksums": {name.rpartition(":")[2]: each for name, each in found.items()}}
