"""What this rank says it is when it meets its peers."""

import hashlib
import json
from typing import Any

import vllm.version

import vllm_dwdp
from vllm_dwdp.distributed.fingerprint import Fingerprint
from vllm_dwdp.distributed.launch import Seat
from vllm_dwdp.distributed.membership import Membership
from vllm_dwdp.distributed.returning import renewed_weights
from vllm_dwdp.executor.source import Source, first_source, take_over


def open_membership(seat: Seat, vllm_config: Any, page_bytes: int) -> Membership:
    """Begin to answer as the rank of `seat`; the caller closes the membership.

    If the group has read another checkpoint since it started, so will this rank.

    Raises:
        DwdpError: as `Membership.join`.
    """
    config, endpoint = seat.launch.config, seat.launch.endpoint
    place = {"group": seat.group, "dwdp_rank": seat.dwdp_rank, "group_size": config.group_size}
    served = renewed_weights(endpoint, **place)
    source = None if served is None else take_over(vllm_config, served)
    membership = Membership.join(
        endpoint,
        **place,
        fingerprint=make_fingerprint(seat, vllm_config, page_bytes, source),
        join_timeout_s=config.join_timeout_s,
    )
    membership.describe_by(lambda: seat.status() | {"mode": seat.launch.config.mode})
    return membership


def make_fingerprint(
    seat: Seat, vllm_config: Any, page_bytes: int, source: Source | None = None
) -> Fingerprint:
    """Everything that must be equal on every rank of a group.

    Args:
        source: of the weights; None for what the command line names.
    """
    config, model = seat.launch.config, vllm_config.model_config
    source = first_source(vllm_config) if source is None else source
    return Fingerprint(
        model=source.model,
        revision=source.revision,
        checkpoint_digest=source.checkpoint_digest,
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


def _config_digest(config_json: str) -> str:
    """Digest of a model's config, wherever it was read from."""
    content = _without_path(json.loads(config_json))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _without_path(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_path(each) for key, each in value.items() if key != "_name_or_path"}
