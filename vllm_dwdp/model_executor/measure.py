"""What a device reaches at this start: speed of copies, and of kernels that read peers in place.

Measured on the first MoE layer while nothing is served, in milliseconds; `auto` chooses by it. The
clock is the host's, around work that ends before it is read, so one code serves every device.
"""

import statistics
import time
from collections.abc import Callable

import torch

from vllm_dwdp.device.base import Device
from vllm_dwdp.device.tensor import tensor_at
from vllm_dwdp.errors import TransferError
from vllm_dwdp.layout.composite import ByteRange
from vllm_dwdp.logger import init_logger
from vllm_dwdp.model_executor.composites import CompositeMapper, LayerView
from vllm_dwdp.model_executor.rings import PrefetchRings
from vllm_dwdp.model_executor.routed_experts import RingPosition
from vllm_dwdp.prefetch.mode_policy import LayerCosts

logger = init_logger(__name__)

ROUNDS = 5
COMPARED_BYTES = 64 * 2**20


def measure_costs(
    mapper: CompositeMapper, rings: PrefetchRings, index: int, direct: LayerView
) -> LayerCosts:
    """Costs of the layout's layer `index`, which has remote pages and of which `direct` is a view."""
    device, layer, rank = mapper.device, mapper.layout.layers[index], mapper.dwdp_rank
    number, remote = max(layer.remote_parts(rank), key=lambda part: len(part[1]))
    weight, address = layer.weights[number], direct.addresses[number]
    copy_bytes_per_s = _copy_speed(device, rings, rings.positions[index])
    direct_bytes_per_s = _read_speed(device, address, remote)
    own_bytes_per_s = _read_speed(device, address, weight.shard_pages(rank) or remote)
    layer_costs = LayerCosts(
        num_experts=weight.placement.num_experts,
        num_remote_experts=weight.placement.num_experts - len(weight.placement.resident[rank]),
        experts_per_token=mapper.layers[index].layer.top_k,
        expert_bytes=sum(each.expert_bytes for each in layer.weights),
        copy_bytes_per_s=copy_bytes_per_s,
        direct_bytes_per_s=direct_bytes_per_s,
        # The rest of a small step's layer reads weights of its own: at least one expert's worth.
        other_seconds=layer.weights[number].expert_bytes / own_bytes_per_s,
    )
    logger.info(
        "DWDP measured: copies from peers %.1f GB/s, kernels that read peers %.1f GB/s, "
        "kernels that read own memory %.1f GB/s",
        copy_bytes_per_s / 1e9,
        direct_bytes_per_s / 1e9,
        own_bytes_per_s / 1e9,
    )
    return layer_costs


def check_views(direct: LayerView, ring: LayerView) -> None:
    """A layer that was just fetched must read the same in both views.

    Raises:
        TransferError: it does not; the device's memory cannot be trusted.
    """
    for number, (read, copied) in enumerate(zip(direct.composites, ring.composites, strict=True)):
        if not _same_bytes(read, copied):
            raise TransferError(
                f"composite tensor {number} of a layer reads differently through copies than in place: "
                "this device or its driver does not do what DWDP expects of it. Use stock vLLM, and "
                "report the GPU and the driver version."
            )


def _same_bytes(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Compared piece by piece: a comparison takes a byte of memory for each of its bytes."""
    pieces = (tensor.split(COMPARED_BYTES) for tensor in (first, second))
    return all(torch.equal(one, other) for one, other in zip(*pieces, strict=True))


def _copy_speed(device: Device, rings: PrefetchRings, position: RingPosition) -> float:
    """Bytes per second of one layer's fill."""
    ring = rings.rings[position.ring]
    num_bytes = sum(ring.layer_bytes(position.index).values())

    def fill() -> None:
        rings.queue.issue(ring.batches[position.index], None)
        rings.queue.drain()

    return num_bytes / _median_seconds(fill)


def _read_speed(device: Device, address: int, span: ByteRange) -> float:
    """Bytes per second of a reduction over `span` of the tensor at `address`."""
    words = tensor_at(address + span.start, torch.int32, (len(span) // 4,), device.torch_device)

    def read() -> None:
        words.amax()
        device.synchronize()

    return max(1, len(span)) / _median_seconds(read)


def _median_seconds(action: Callable[[], None]) -> float:
    action()
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
