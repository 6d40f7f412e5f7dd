"""The speeds that a device reaches at this start, by which the mode policy chooses.

They are those of copies from peers, of kernels that read peers in place, and of its own memory and
products.

Measured when the ranks of the group have met and none serves, each for the same fraction of a second:
all pull at once, as they do while they serve. A rank that returns measures beside ranks that serve. The
clock is the host's, around work that ends before it is read, so one code serves every device.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from vllm_dwdp.device.base import Device
from vllm_dwdp.device.queue import ResolvedSlice, Waves
from vllm_dwdp.device.tensor import tensor_at
from vllm_dwdp.errors import TransferError
from vllm_dwdp.model_executor.composites import LayerView

ROUNDS = 5
WINDOW_S = 0.3
"""So long is each speed measured at least, so that ranks which begin a little apart do it together."""
PULLED_BYTES = 512 * 2**20
"""Of a round, at most: a fraction of a slot, which is not allocated yet, so there is room."""
COMPARED_BYTES = 64 * 2**20
PRODUCT_SIZES = (256, 512, 1024, 2048, 4096)
LONG_PRODUCT_S = 1e-3
"""A product that takes so long is large enough for its speed."""


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """What one rank measured.

    Args:
        copy_bytes_per_s: of copies from all peers.
        direct_bytes_per_s: of kernels that read all peers in place.
        memory_bytes_per_s: of kernels that read the device's own memory.
        operations_per_s: of a large product of matrices in bf16.
        has_fp8, has_fp4: whether the device has units for products of such numbers.
        copied_by: how copies are made, for the log.
    """

    copy_bytes_per_s: float
    direct_bytes_per_s: float
    memory_bytes_per_s: float
    operations_per_s: float
    has_fp8: bool = False
    has_fp4: bool = False
    copied_by: str = ""

    def __str__(self) -> str:
        return (
            f"copies from peers {self.copy_bytes_per_s / 1e9:.1f} GB/s ({self.copied_by}), "
            f"kernels that read peers {self.direct_bytes_per_s / 1e9:.1f} GB/s, that read own memory "
            f"{self.memory_bytes_per_s / 1e9:.1f} GB/s, products {self.operations_per_s / 1e12:.3g} "
            "TFLOP/s"
        )


def measure_speeds(device: Device, peers: Mapping[int, tuple[int, int]]) -> Speeds:
    """Measure everything, in about a second.

    Args:
        peers: address and bytes of each peer's shard, by rank in the order in which they are pulled;
            what is read of them may be incomplete.
    """
    most = PULLED_BYTES // len(peers)
    spans = [(address, min(size, most)) for address, size in peers.values()]
    num_bytes = sum(size for _, size in spans)
    own = torch.empty(num_bytes, dtype=torch.uint8, device=device.torch_device)
    capability = (0, 0)
    if device.torch_device.type == "cuda":
        capability = torch.cuda.get_device_capability(device.torch_device)
    copy_seconds, copied_by = _copy_seconds(device, spans, own.data_ptr())
    speeds = Speeds(
        copy_bytes_per_s=num_bytes / copy_seconds,
        direct_bytes_per_s=num_bytes / _read_seconds(device, spans),
        memory_bytes_per_s=num_bytes / _read_seconds(device, [(own.data_ptr(), num_bytes)]),
        operations_per_s=_operations_per_s(device),
        has_fp8=capability >= (8, 9),
        has_fp4=capability >= (10, 0),
        copied_by=copied_by,
    )
    del own
    device.release_free_memory()
    return speeds


def check_views(
    layer_name: str, weights: Sequence[str], direct: LayerView, ring: LayerView
) -> None:
    """Check that a layer that was just fetched reads the same in both views.

    Args:
        layer_name: of the layer.
        weights: names of its composite tensors, in the order of the views.

    Raises:
        TransferError: it does not; the device's memory cannot be trusted.
    """
    for name, read, copied in zip(weights, direct.composites, ring.composites, strict=True):
        if not _same_bytes(read, copied):
            raise TransferError(
                f"{layer_name}: {name} reads differently through copies than in place: "
                "this device or its driver does not do what DWDP expects of it. Use stock vLLM, and "
                "report the GPU and the driver version."
            )


def _same_bytes(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Compare piece by piece: a comparison takes a byte of memory for each of its bytes."""
    pieces = (tensor.split(COMPARED_BYTES) for tensor in (first, second))
    return all(torch.equal(one, other) for one, other in zip(*pieces, strict=True))


def _copy_seconds(
    device: Device, spans: list[tuple[int, int]], destination: int
) -> tuple[float, str]:
    """Seconds of copies of all spans, in turns as a ring makes them; and how they were made."""
    queue = device.make_queue()
    try:
        batch = queue.add_batch(_in_turns(spans, destination, queue.slice_bytes))

        def fill() -> None:
            queue.issue(batch, None)
            queue.drain()

        return _median_seconds(fill), queue.describe()
    finally:
        queue.close()


def _in_turns(spans: list[tuple[int, int]], destination: int, slice_bytes: int) -> Waves:
    """Waves of one slice of each span; all slices go to `destination`, one behind the other."""
    waves: list[list[ResolvedSlice]] = []
    for start in range(0, max(size for _, size in spans), slice_bytes):
        waves.append([])
        for address, size in spans:
            if start < size:
                num_bytes = min(slice_bytes, size - start)
                waves[-1].append((destination, address + start, num_bytes))
                destination += num_bytes
    return waves


def _read_seconds(device: Device, spans: list[tuple[int, int]]) -> float:
    tensors = [
        tensor_at(address, torch.int32, (size // 4,), device.torch_device)
        for address, size in spans
    ]

    def read() -> None:
        for words in tensors:
            words.amax()
        device.synchronize()

    return _median_seconds(read)


def _operations_per_s(device: Device) -> float:
    for size in PRODUCT_SIZES:
        matrix = torch.ones(size, size, dtype=torch.bfloat16, device=device.torch_device)
        out = torch.empty_like(matrix)

        def multiply(matrix: torch.Tensor = matrix, out: torch.Tensor = out) -> None:
            torch.mm(matrix, matrix, out=out)
            device.synchronize()

        seconds = _median_seconds(multiply, window_s=0.0)
        if seconds > LONG_PRODUCT_S:
            break
    return 2.0 * size**3 / seconds


def _median_seconds(action: Callable[[], None], window_s: float = WINDOW_S) -> float:
    action()
    seconds: list[float] = []
    begun = time.perf_counter()
    while len(seconds) < ROUNDS or time.perf_counter() - begun < window_s:
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
