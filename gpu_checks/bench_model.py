"""The made-up model of `gpu_checks.bench`, whose layers get their experts in several ways.

The ways are listed there; each is one method of `Model`, and what it does is what a graph of
piecewise mode holds. `join` and `gather` use the ring's slots behind its back.
"""

import os
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from gpu_checks.accelerator import Accelerator
from gpu_checks.bench_cases import MODES, NUM_LAYERS
from gpu_checks.expert_gather import ExpertGather
from gpu_checks.expert_ranks import RankMemory
from gpu_checks.moe_kernels import MoeKernel, Routing
from vllm_dwdp.device.cuda_copies import CudaCopyQueue
from vllm_dwdp.device.queue import ResolvedSlice
from vllm_dwdp.model_executor import ops
from vllm_dwdp.model_executor.composites import CompositeMapper, LayerView
from vllm_dwdp.model_executor.rings import PrefetchRings
from vllm_dwdp.prefetch.copy_plan import plan_layer_copies


class Model:
    """A made-up model over one rank's experts, for one number of tokens."""

    def __init__(
        self,
        gpu: Accelerator,
        rank: RankMemory,
        mapper: CompositeMapper,
        rings: PrefetchRings,
        direct: list[LayerView],
        kernel: MoeKernel,
        num_tokens: int,
    ) -> None:
        self.gpu, self.rings, self.direct, self.kernel = gpu, rings, direct, kernel
        shape, device = rank.shape, gpu.device
        hidden = (num_tokens, shape.hidden_size)
        self.hidden = torch.randn(hidden, device=device).to(torch.bfloat16)
        self.attended = torch.zeros_like(self.hidden)
        square = (shape.hidden_size, shape.hidden_size)
        self.dense = [
            (torch.randn(square, device=device) * shape.hidden_size**-0.5).to(torch.bfloat16)
            for _ in range(3)
        ]
        self.routings = [
            Routing.random(num_tokens, shape.num_experts, shape.top_k, device, layer)
            for layer in range(NUM_LAYERS)
        ]
        self.merged = {
            name: torch.empty_like(tensor) for name, tensor in rings.views[0].tensors.items()
        }
        self.gathers: list[ExpertGather] = []
        if gpu.is_real or os.environ.get("TRITON_INTERPRET") == "1":
            self.gathers = [
                ExpertGather.plan(mapper, layer, rings.views[layer]) for layer in range(NUM_LAYERS)
            ]
        self.join_queue = CudaCopyQueue(mapper.device.device)  # type: ignore[attr-defined]
        self.join_batches = [
            self.join_queue.add_batch(_resolved(mapper, rings, layer))
            for layer in range(NUM_LAYERS)
        ]

    def close(self) -> None:
        """Close the copy queue; before the ring is closed."""
        self.gpu.synchronize()
        self.join_queue.close()

    def attention(self) -> None:
        """Stand in for attention, which runs between the graphs of piecewise mode."""
        torch.mm(self.hidden, self.dense[0], out=self.attended)

    def experts(self, layer: int, tensors: dict[str, torch.Tensor]) -> None:
        """Run the expert kernels and two dense products."""
        routing = self.routings[layer]
        output = self.kernel(
            self.attended,
            tensors["w13_weight"],
            tensors["w2_weight"],
            routing.topk_weights,
            routing.topk_ids,
        )
        output = torch.mm(torch.mm(output, self.dense[1]), self.dense[2])
        self.hidden.copy_(F.rms_norm(self.attended + output, (self.hidden.shape[1],)))

    # One function per way to fetch; each is what a graph of piecewise mode holds.

    def resident(self, layer: int) -> None:
        self.experts(layer, self.direct[layer].tensors)

    def prefetch(self, layer: int) -> None:
        ops.wait_layer(self.attended, 0, layer)
        self.experts(layer, self.rings.views[layer].tensors)
        ops.record_layer(self.hidden, 0, layer)

    def merge(self, layer: int) -> None:
        ops.wait_layer(self.attended, 0, layer)
        for name, merged in self.merged.items():
            merged.copy_(self.rings.views[layer].tensors[name])
        ops.record_layer(self.hidden, 0, layer)
        self.experts(layer, self.merged)

    def join(self, layer: int) -> None:
        before, after = (layer - 1) % NUM_LAYERS, (layer + 1) % NUM_LAYERS
        stream, batches = self.gpu.current_stream(), self.join_batches
        if self.gpu.is_real:
            self.join_queue.capture_record(batches[before], stream)
        self.experts(layer, self.rings.views[layer].tensors)
        if self.gpu.is_real:
            self.join_queue.capture_fill(batches[after], batches[before], stream)
        else:
            self.join_queue.issue(batches[after], None)
            self.join_queue.drain()

    def gather(self, layer: int) -> None:
        self.gathers[layer].launch(self.routings[layer].topk_ids)
        self.experts(layer, self.rings.views[layer].tensors)

    # --- steps ---

    def make_step(self, way: str, mode: str) -> Callable[[], None]:
        """Make a step that fetches in one way and runs in one mode; capture what it needs."""
        piece: Callable[[int], None] = getattr(self, way)

        def whole() -> None:
            for layer in range(NUM_LAYERS):
                self.attention()
                piece(layer)

        if mode == "eager":
            whole()
            return whole
        if way != "join":  # which exists in graphs only, and whose kernels have run by then
            whole()
        self.gpu.synchronize()
        if mode == "full":
            return self.gpu.capture(whole)
        replays = [self.gpu.capture(partial(piece, layer)) for layer in range(NUM_LAYERS)]

        def pieces() -> None:
            for replay in replays:
                self.attention()
                replay()

        return pieces

    def output_of(self, step: Callable[[], None]) -> torch.Tensor:
        """Return what a step makes of the same input."""
        self.hidden.fill_(0.5)
        self.rings.begin_forward()
        step()
        self.gpu.synchronize()
        return self.hidden.clone()


def _resolved(
    mapper: CompositeMapper, rings: PrefetchRings, layer: int
) -> list[list[ResolvedSlice]]:
    """Resolve the copies of a layer to addresses, as the ring does."""
    plan = plan_layer_copies(mapper.layout.layers[layer], mapper.dwdp_rank, rings.queue.slice_bytes)
    return [
        [
            (
                rings.views[layer].addresses[copy.weight] + copy.offset,
                mapper.peers[copy.peer_rank].address + copy.source_offset,
                copy.num_bytes,
            )
            for copy in wave
        ]
        for wave in plan
    ]


WAYS = {
    "resident": MODES,
    "prefetch": MODES,
    "merge": ("eager", "piecewise"),
    "join": ("piecewise",),
    "gather": ("eager", "full"),
}
