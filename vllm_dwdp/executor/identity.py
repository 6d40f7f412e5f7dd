"""What this rank says it is when it meets its peers."""

import hashlib
from pathlib import Path
from typing import Any

import vllm.version

import vllm_dwdp
from vllm_dwdp.config import DwdpLaunch
from vllm_dwdp.distributed.endpoint import Endpoint
from vllm_dwdp.distributed.fingerprint import Fingerprint, checkpoint_digest
from vllm_dwdp.distributed.rendezvous import Rendezvous
from vllm_dwdp.memory.device import Device


def make_rendezvous(launch: DwdpLaunch, rank: int, vllm_config: Any, device: Device) -> Rendezvous:
    """A started rendezvous of this rank's group; the caller closes it."""
    rendezvous = Rendezvous(
        Endpoint.of(launch),
        group=launch.group(rank),
        dwdp_rank=launch.dwdp_rank(rank),
        group_size=launch.config.group_size,
        fingerprint=make_fingerprint(launch, vllm_config, device.page_bytes),
        join_timeout_s=launch.config.join_timeout_s,
    )
    rendezvous.start()
    return rendezvous


def make_fingerprint(launch: DwdpLaunch, vllm_config: Any, page_bytes: int) -> Fingerprint:
    """Everything that must be equal on every rank of a group."""
    model = vllm_config.model_config
    return Fingerprint(
        model=str(model.model),
        revision=str(model.revision),
        checkpoint_digest=_checkpoint_digest(vllm_config),
        config_digest=_digest(model.hf_config.to_json_string(use_diff=False)),
        dtype=str(model.dtype),
        quantization=str(model.quantization),
        group_size=launch.config.group_size,
        experts_per_rank=launch.config.experts_per_rank or 0,
        page_bytes=page_bytes,
        vllm_version=vllm.version.__version__,
        plugin_version=vllm_dwdp.__version__,
    )


def _checkpoint_digest(vllm_config: Any) -> str:
    """Content of a local checkpoint; for a name on a hub the revision must do."""
    if vllm_config.load_config.load_format == "dummy":
        return f"dummy-{vllm_config.model_config.seed}"
    folder = Path(vllm_config.model_config.model)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return checkpoint_digest(files) if files else "not local"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
