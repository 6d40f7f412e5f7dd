"""What a layer of the served model costs on this rank, and the policy that follows from it.

The compute of a step is not timed: kernels run over all experts only once the views are bound, and by
then they are chosen; what vLLM runs by itself before it serves leaves attention out, and compiles
meanwhile. So it is the planner's roofline, the formulas by which `vllm-dwdp plan` says its break-even,
over four speeds that this rank measured. Worker's main thread.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.device.base import Device, PeerMemory
from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.layout.model import ModelLayout
from vllm_dwdp.logger import init_logger
from vllm_dwdp.model_executor.measure import Speeds, measure_speeds
from vllm_dwdp.model_executor.sharded_layer import ShardedLayer
from vllm_dwdp.planner.cost import CostModel
from vllm_dwdp.planner.estimates import PROMPT_TOKENS, layer_costs
from vllm_dwdp.planner.hardware import DEFAULT, Hardware
from vllm_dwdp.planner.model_shape import ModelShape, shape_of
from vllm_dwdp.prefetch.mode_policy import LayerCosts, Mode, ModePolicy

logger = init_logger(__name__)

LARGE_PRODUCT = 0.75
"""What a large product in bf16 reaches of the data sheet's peak, of which the planner's efficiencies are
parts; an assumption."""
MUCH_FASTER = 1.5
"""Reads in place over copies, from which one of the two was not what it should be."""


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What vLLM was told to serve, as far as costs depend on it.

    Args:
        config: of the text model, as in its config.json.
        max_num_batched_tokens: vLLM's limit of a step.
        max_model_len: the longest sequence.
        tensor_parallel_size: workers that share the compute of a step.
    """

    config: Mapping[str, Any]
    max_num_batched_tokens: int
    max_model_len: int
    tensor_parallel_size: int = 1

    def shape(self) -> ModelShape | None:
        """Its sizes; None where its config has none that we know."""
        try:
            return shape_of(dict(self.config))
        except DwdpConfigError as error:
            logger.info(
                "DWDP cannot plan the compute of this model, only measure copies: %s", error
            )
            return None


def measured_costs(
    config: DwdpConfig,
    device: Device,
    layout: ModelLayout,
    layers: list[ShardedLayer],
    dwdp_rank: int,
    peers: Mapping[int, PeerMemory],
    served: ServedModel,
) -> LayerCosts | None:
    """Costs of the layer that copies most; None if nothing is ever copied, and nothing is measured then.

    Args:
        layers: in the order of the layout.
        peers: as far as they are mapped; their pages need not be whole.
    """
    if config.mode == "direct" or device.copies_share_compute:
        return None
    remote_bytes = [layer.remote_bytes(dwdp_rank) for layer in layout.layers]
    largest = max(range(len(remote_bytes)), key=remote_bytes.__getitem__)
    if not remote_bytes[largest]:
        return None
    spans = {
        rank: (peers[rank].address, layout.shard_bytes(rank)) for rank in _after(dwdp_rank, peers)
    }
    speeds = measure_speeds(device, {rank: span for rank, span in spans.items() if span[1]})
    logger.info("DWDP measured: %s", speeds)
    if speeds.direct_bytes_per_s > MUCH_FASTER * speeds.copy_bytes_per_s:
        logger.warning(
            "DWDP: kernels read peers in place %.1f times as fast as copies from them, which cross the "
            "same links (ranks that share a GPU, or copies without a copy engine?). Steps are chosen as "
            'if both were equal; dwdp mode "direct" or direct_max_tokens says otherwise.',
            speeds.direct_bytes_per_s / speeds.copy_bytes_per_s,
        )
    placement = layout.layers[largest].weights[0].placement
    return costs_from(
        speeds,
        served,
        group_size=config.group_size,
        num_experts=placement.num_experts,
        num_resident=len(placement.resident[dwdp_rank]),
        experts_per_token=layers[largest].layer.top_k,
        remote_bytes=remote_bytes[largest],
    )


def costs_from(
    speeds: Speeds,
    served: ServedModel,
    *,
    group_size: int,
    num_experts: int,
    num_resident: int,
    experts_per_token: int,
    remote_bytes: int,
) -> LayerCosts:
    """Costs of a layer by measured speeds; its compute by the planner where it knows the model.

    Elsewhere only the reading of its experts counts as compute: then a break-even is known only where
    that alone hides the copies.
    """
    num_remote = num_experts - num_resident
    bare = LayerCosts(
        num_experts=num_experts,
        num_remote_experts=num_remote,
        experts_per_token=experts_per_token,
        remote_bytes=remote_bytes,
        copy_bytes_per_s=speeds.copy_bytes_per_s,
        direct_bytes_per_s=speeds.direct_bytes_per_s,
        compute_seconds=lambda num_tokens: 0.0,
    )
    shape = served.shape()
    if shape is None or shape.num_experts != num_experts:
        layer_bytes = remote_bytes / num_remote * num_experts

        def reading_seconds(num_tokens: int) -> float:
            touched = bare.expected_remote_experts(num_tokens) / num_remote
            return touched * layer_bytes / speeds.memory_bytes_per_s

        return replace(bare, compute_seconds=reading_seconds)
    even = -(-num_experts // group_size)
    model = CostModel(
        shape=shape,
        hardware=hardware_of(speeds),
        efficiency=replace(DEFAULT, link=1.0),
        group_size=group_size,
        extra_experts=max(0, num_resident - even),
    )
    planned = layer_costs(model, min(served.max_model_len, PROMPT_TOKENS))

    def compute_seconds(num_tokens: int) -> float:
        return planned.compute_seconds(num_tokens) / served.tensor_parallel_size

    return replace(bare, compute_seconds=compute_seconds, beside_copies=planned.beside_copies)


def hardware_of(speeds: Speeds) -> Hardware:
    """Return the accelerator whose peaks, at the planner's efficiencies, are what was measured."""
    bf16_tflops = speeds.operations_per_s / 1e12 / LARGE_PRODUCT
    return Hardware(
        name="measured",
        bf16_tflops=bf16_tflops,
        fp8_tflops=bf16_tflops * (2 if speeds.has_fp8 else 1),
        fp4_tflops=bf16_tflops * (4 if speeds.has_fp4 else 0),
        memory_gb=0.0,  # costs of a layer do not depend on it
        memory_gbps=speeds.memory_bytes_per_s / 1e9 / DEFAULT.memory,
        link_gbps=speeds.copy_bytes_per_s / 1e9,
        source="measured at start",
    )


def proposed_limit(config: DwdpConfig, costs: LayerCosts | None) -> int | None:
    """Return the largest step that this rank would read in place for; None if it has no choice."""
    if config.mode != "auto" or costs is None:
        return None
    limit = config.direct_max_tokens
    return costs.direct_max_tokens if limit is None else limit


def choose_policy(
    config: DwdpConfig, device: Device, costs: LayerCosts | None, agreed: int | None
) -> ModePolicy:
    """Decide how this rank's forwards read remote experts.

    Args:
        agreed: the limit of the group.
    """
    break_even = None if costs is None else costs.break_even_tokens
    if config.mode != "auto":
        return ModePolicy.forced(Mode(config.mode), break_even)
    if costs is None:
        return ModePolicy.direct_only(shares_compute=device.copies_share_compute)
    if config.direct_max_tokens is not None:
        return ModePolicy.by_tokens(config.direct_max_tokens, break_even, was_set=True)
    assert agreed is not None, "this rank has proposed one itself"
    return ModePolicy.by_tokens(agreed, break_even)


def log_break_even(rank: int, policy: ModePolicy, served: ServedModel) -> None:
    """Say from which step on copies are hidden, and warn if vLLM makes no such step."""
    needed, most = policy.break_even_tokens, served.max_num_batched_tokens
    if needed is None:
        return
    logger.info(
        "DWDP rank %d: copies are hidden in steps of about %d tokens and more (%s)",
        rank,
        needed,
        policy.reason,
    )
    if most < needed:
        logger.warning(
            "DWDP rank %d: max_num_batched_tokens=%d is below the break-even of about %d tokens a step: "
            "every step of prompts waits for its experts. Start with --max-num-batched-tokens %d or "
            "more, share over fewer ranks (group_size), or hold more experts per rank "
            "(experts_per_rank).",
            rank,
            most,
            needed,
            needed,
        )


def _after(dwdp_rank: int, peers: Mapping[int, PeerMemory]) -> list[int]:
    """Return the peers from the next rank on, so that not all ranks pull from the same one first."""
    return sorted(peers, key=lambda rank: (rank < dwdp_rank, rank))
