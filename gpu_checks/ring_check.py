"""A prefetch ring under provocation: late copies, poisoned slots, slow kernels, and broken on purpose.

Kernels copy their layer's experts out, so that a layer that ran too early, or whose slot was
overwritten too early, shows in its bytes. What breaks a ring is here as well: a check that sees nothing
wrong in a broken ring proves nothing. On a GPU, or simulated (`gpu_checks.accelerator`).
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gpu_checks.accelerator import Accelerator
from gpu_checks.expert_ranks import RankMemory, same_bytes
from vllm_dwdp.device.host_queue import DELAY_ENV, POISON_ENV
from vllm_dwdp.model_executor import ops
from vllm_dwdp.model_executor.rings import PrefetchRings

PAUSE_US = 600
SLICE_BYTES = 512 * 1024
"""Small, so that small experts too are cut and come in several waves."""


def provoke_races(max_delay_us: int = 3000) -> None:
    """Let queues that this process makes from now on poison slots and delay copies."""
    os.environ |= {POISON_ENV: "1", DELAY_ENV: str(max_delay_us)}


class RingCheck:
    """A ring over a rank's layers and what each layer's kernels saw of it."""

    def __init__(self, gpu: Accelerator, rank: RankMemory) -> None:
        self.gpu = gpu
        self.rings = rank.rings(slice_bytes=SLICE_BYTES)
        self.num_layers = len(rank.layout.layers)
        self.expected = [rank.whole(layer) for layer in range(self.num_layers)]
        self.seen = [
            {name: torch.zeros_like(tensor) for name, tensor in layer.items()}
            for layer in self.expected
        ]
        self._tick = torch.zeros(1, device=gpu.device)

    def run(self, layers: Sequence[int]) -> None:
        """Run the kernels of some layers on the current stream, eagerly or captured."""
        for layer in layers:
            ops.wait_layer(self._tick, 0, layer)
            self.gpu.pause(PAUSE_US)
            for name, seen in self.seen[layer].items():
                seen.copy_(self.rings.views[layer].tensors[name])
            ops.record_layer(self._tick, 0, layer)

    def make_step(self, mode: str) -> Callable[[], object]:
        """Make one forward of all layers: `eager`, `piecewise` (graphs of two layers) or `full`."""
        layers = range(self.num_layers)
        if mode == "eager":
            return lambda: self.run(layers)
        size = {"piecewise": 2, "full": self.num_layers}[mode]
        self.run(layers)
        self.gpu.synchronize()
        pieces = [layers[start : start + size] for start in layers[::size]]
        replays = [self.gpu.capture(functools.partial(self.run, piece)) for piece in pieces]
        return lambda: [replay() for replay in replays]

    def wrong_layers(self, step: Callable[[], object], rounds: int) -> list[int]:
        """Return layers that saw anything but their experts, in steps one by one and back to back."""
        wrong: set[int] = set()
        for number in range(rounds):
            self.rings.begin_forward()
            self.forget()
            for _ in range(1 + number % 2 * 2):
                step()
            wrong |= set(self.compare())
        return sorted(wrong)

    def forget(self) -> None:
        """Clear what was seen."""
        for layer in self.seen:
            for seen in layer.values():
                seen.zero_()

    def compare(self) -> list[int]:
        """Return layers that saw anything but their experts since `forget`."""
        self.gpu.synchronize()
        return [
            number
            for number, (seen, expected) in enumerate(zip(self.seen, self.expected, strict=True))
            if not all(same_bytes(seen[name], expected[name]) for name in expected)
        ]

    def quiet(self) -> None:
        """Block until nothing runs, also after a broken run."""
        self.gpu.synchronize()
        self.rings.queue.drain()


def without_waits(rings: PrefetchRings) -> None:
    """Break the ring: kernels do not wait for copies."""
    queue: Any = rings.queue
    queue.wait = lambda batch: 0.0


def without_records(rings: PrefetchRings) -> None:
    """Break the ring: copies do not wait for kernels (but inside a graph)."""
    queue: Any = rings.queue
    queue.record = lambda batch: None
