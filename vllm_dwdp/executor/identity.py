"""What this rank says it is when it meets its peers."""

import hashlib
import json
from pathlib import Path
from typing import Any

import vllm.version

import vllm_dwdp
from vllm_dwdp.distributed.fingerprint import Fingerprint, checkpoint_digest
from vllm_dwdp.distributed.launch import Seat
from vllm_dwdp.distributed.membership import Membership
from vllm_dwdp.logger import init_logger

logger = init_logger(__name__)

_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.gguf")


def open_membership(seat: Seat, vllm_config: Any, page_bytes: int) -> Membership:
    """Begin to answer as the rank of `seat`; the caller closes the membership.

    Raises:
        DwdpError: as `Membership.join`.
    """
    membership = Membership.join(
        seat.launch.endpoint,
        group=seat.group,
        dwdp_rank=seat.dwdp_rank,
        group_size=seat.launch.config.group_size,
        fingerprint=make_fingerprint(seat, vllm_config, page_bytes),
        join_timeout_s=seat.launch.config.join_timeout_s,
    )
    membership.describe_by(lambda: seat.status() | {"mode": seat.launch.config.mode})
    return membership


def make_fingerprint(seat: Seat, vllm_config: Any, page_bytes: int) -> Fingerprint:
    """Everything that must be equal on every rank of a group."""
    config, model = seat.launch.config, vllm_config.model_config
    return Fingerprint(
        model=str(model.model),
        revision=str(model.revision),
        checkpoint_digest=_checkpoint_digest(vllm_config),
        config_digest=_config_digest(model.hf_config.to_json_string(use_diff=False)),
        dtype=str(model.dtype),
        quantization=str(model.quantization),
        group_size=config.group_size,
        experts_per_rank=config.experts_per_rank or 0,
        tensor_slice=seat.tensor_slice,
        page_bytes=page_bytes,
        vllm_version=vllm.version.__version__,
        plugin_version=vllm_dwdp.__version__,
    )


def _checkpoint_digest(vllm_config: Any) -> str:
    """Content of a local checkpoint, or the commit that a name on a hub stands for."""
    model = vllm_config.model_config
    if vllm_config.load_config.load_format == "dummy":
        return f"dummy-{model.seed}"
    files = _weight_files(Path(model.model))
    if files:
        return checkpoint_digest(files)
    commit = getattr(model.hf_config, "_commit_hash", None)
    if commit is not None:
        return f"commit {commit}"
    logger.warning(
        "DWDP: the content of %s cannot be compared between ranks (no local weight files, no commit of "
        "a hub): make sure yourself that every rank loads the same",
        model.model,
    )
    return "unknown"


def _weight_files(path: Path) -> list[Path]:
    """Return the files of a checkpoint folder in the format that vLLM prefers; or `path` itself."""
    if path.is_file():
        return [path]
    listed = (sorted(path.glob(pattern)) for pattern in _WEIGHT_FILES)
    return next(filter(None, listed), [])


def _config_digest(config_json: str) -> str:
    """Digest of a model's config, wherever it was read from."""
    content = _without_path(json.loads(config_json))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _without_path(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_path(each) for key, each in value.items() if key != "_name_or_path"}
