"""Whether new weights can be read here: asked before any rank of a group gives up those that it has.

A wrong path, a file that is cut off and a checkpoint that is still being written are found here, where
they cost nothing. Shapes and names are not looked at: only the model knows which it takes. Runs in the
worker's main thread.
"""

import json
from pathlib import Path
from typing import Any

from vllm_dwdp.compat.worker import reloading
from vllm_dwdp.distributed.fingerprint import declared_bytes
from vllm_dwdp.errors import WeightUpdateError
from vllm_dwdp.executor.source import WEIGHT_FILES, weight_files

_INDEX = "*.safetensors.index.json"


def check_readable(vllm_config: Any, model: Any, path: str | None) -> None:
    """Check the checkpoint at `path`; None stands for the one that was read last.

    Raises:
        WeightUpdateError: it is not there, or not whole.
        Exception: vLLM cannot reload in this load format, or cannot get that name from a hub.
    """
    place = vllm_config.model_config.model if path is None else path
    reloading.check_loader(vllm_config)
    if Path(place).exists():
        _check_local(Path(place))
    elif place.startswith(("/", ".", "~")):
        raise WeightUpdateError(
            f"there is no {place} on this host. Give a path that every rank can read"
        )
    else:
        reloading.download(vllm_config, model, path)


def _check_local(place: Path) -> None:
    files = weight_files(place)
    if not files and not any(True for pattern in WEIGHT_FILES for _ in place.rglob(pattern)):
        raise WeightUpdateError(f"{place} has no weights ({', '.join(WEIGHT_FILES)})")
    for file in files:
        if file.suffix == ".safetensors":
            _check_whole(file)
    for index in place.glob(_INDEX):
        listed = set(json.loads(index.read_text())["weight_map"].values())
        missing = sorted(name for name in listed if not (place / name).exists())
        if 0 < len(missing) < len(listed):  # all are missing where it lists another format's files
            raise WeightUpdateError(
                f"{index} lists {len(listed)} files, and {len(missing)} of them are missing, as "
                f"{missing[0]}. Begin once the checkpoint is written"
            )


def _check_whole(file: Path) -> None:
    found, declared = file.stat().st_size, declared_bytes(file)
    if found != declared:
        raise WeightUpdateError(
            f"{file} is not whole: it has {found} bytes, and "
            f"{'no header' if declared is None else f'{declared} by its header'}. Begin once the "
            "checkpoint is written"
        )
