"""The CUDA device's memory of whole models, over a driver that keeps the books and has no memory.

Everything above the driver wrapper is the product's own, so what is counted here (bytes, allocations,
mappings) is what a rank would ask a driver for. NOT A GPU.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from vllm_dwdp.device import cuda
from vllm_dwdp.device.allocations import Allocation, Allocations
from vllm_dwdp.device.cuda import CudaMemory, CudaPeer
from vllm_dwdp.device.queue import Waves
from vllm_dwdp.layout.composite import WeightLayout
from vllm_dwdp.layout.model import ModelLayout, PrivateRows, smallest_composite_bytes
from vllm_dwdp.layout.placement import Placement
from vllm_dwdp.model_executor.composites import CompositeMapper
from vllm_dwdp.model_executor.sharded_layer import ShardedLayer, ShardedWeight

PAGE = 2 * 2**20
NUM_EXPERTS, NUM_LAYERS = 256, 58

Rows = Mapping[str, int]
"""Bytes of one expert in each per-expert tensor of a layer."""

R1_BF16: Rows = {"w13_weight": 4096 * 7168 * 2, "w2_weight": 7168 * 2048 * 2}
R1_FP8: Rows = {
    "w13_weight": 4096 * 7168,
    "w13_weight_scale_inv": 32 * 56 * 4,
    "w2_weight": 7168 * 2048,
    "w2_weight_scale_inv": 56 * 16 * 4,
}
R1_NVFP4: Rows = {
    "w13_weight": 4096 * 3584,
    "w13_weight_scale": 4096 * 448,
    "w13_weight_scale_2": 8,
    "w13_input_scale": 8,
    "w2_weight": 7168 * 1024,
    "w2_weight_scale": 7168 * 128,
    "w2_weight_scale_2": 4,
    "w2_input_scale": 4,
}
"""DeepSeek-R1: hidden size 7168, 2048 in an expert; scales as vLLM keeps them."""


class CountingDriver:
    """Takes the place of `CudaDevice`: hands out numbers, and counts what is held."""

    ordinal = 0
    granularity_bytes = PAGE

    def __init__(self, ordinal: int = 0) -> None:
        self.created_bytes = 0
        self._next = PAGE

    def makes_handles(self, handle_type: str) -> bool:
        return handle_type == "posix_fd"

    def granularity_of(self, handle_type: str) -> int:
        return PAGE

    def create(self, num_bytes: int, *, handle_type: str) -> int:
        assert num_bytes and num_bytes % PAGE == 0
        self.created_bytes += num_bytes
        return self._take(1)

    def reserve(self, num_bytes: int) -> int:
        return self._take(num_bytes)

    def nothing(self, *_: object, **__: object) -> None:
        """Every other call."""

    release = free_address = map = unmap = set_access = synchronize = close = nothing

    def _take(self, amount: int) -> int:
        taken, self._next = self._next, self._next + amount
        return taken


class SilentQueue:
    """A copy queue that copies nothing."""

    busy_seconds = None
    slice_bytes = 32 * 2**20

    def add_batch(self, waves: Waves) -> int:
        return 0

    def nothing(self, *_: object) -> float:
        return 0.0

    issue = wait = record = drain = close = nothing


class CountedMemory(CudaMemory):
    """The CUDA device over a `CountingDriver`."""

    def __init__(self) -> None:
        with patch.object(cuda, "CudaDevice", CountingDriver):
            super().__init__(0, torch_device=torch.device("cpu"), clear_cache=lambda: None)

    def make_queue(self) -> Any:
        return SilentQueue()


def plan_model(layers: Sequence[Rows], group_size: int) -> ModelLayout:
    """Return the layout of a model of such layers, divided as a rank divides it."""
    placement = Placement(num_experts=NUM_EXPERTS, group_size=group_size)
    planned, private = [], []
    for number, rows in enumerate(layers):
        sizes = {name: NUM_EXPERTS * row_bytes for name, row_bytes in rows.items()}
        limit = smallest_composite_bytes(sizes.values(), group_size, PAGE)
        weights = tuple(
            WeightLayout(name=name, placement=placement, expert_bytes=rows[name], page_bytes=PAGE)
            for name in rows
            if sizes[name] >= limit
        )
        planned.append((f"layers.{number}", weights))
        private += [
            PrivateRows(placement=placement, row_bytes=rows[name])
            for name in rows
            if sizes[name] < limit
        ]
    return ModelLayout.plan(planned, private)


def mapper_of(memory: CountedMemory, layout: ModelLayout, undo: ExitStack) -> CompositeMapper:
    """Rank 0 of a group whose shards are all mapped as they are after a start."""
    shard = memory.new_shard("rank 0")
    undo.callback(shard.close)
    shard.append(layout.piece_bytes(0))
    shard.finish()
    peers: dict[int, Any] = {}
    for rank in range(1, layout.group_size):
        imported = Allocations(memory.device)
        for number, num_bytes in enumerate(layout.piece_bytes(rank)):
            imported.add(Allocation(number, num_bytes, is_peers=True))
        peers[rank] = CudaPeer(memory.memory, imported)
        undo.callback(peers[rank].close)
    layers = [
        ShardedLayer(
            layer=SimpleNamespace(layer_name=layer.name, top_k=8),
            placement=layer.weights[0].placement,
            model_number=0,
            run_index=number,
            weights=[
                ShardedWeight(layout=weight, tensors=(), mapping=None)  # type: ignore[arg-type]
                for weight in layer.weights
            ],
        )
        for number, layer in enumerate(layout.layers)
    ]
    return CompositeMapper(
        device=memory,
        layout=layout,
        layers=layers,
        dwdp_rank=0,
        shard=shard,
        peers=peers,
        resources=undo,
    )
