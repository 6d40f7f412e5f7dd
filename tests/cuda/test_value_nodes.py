"""Graphs that wait for values, which the product does not use and `check value_nodes` asks about."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from gpu_checks.accelerator import SimulatedGpu
from gpu_checks.compute_stream import ComputeStream
from gpu_checks.fake import fake_settings
from gpu_checks.value_nodes import ValueRing


@contextmanager
def value_ring() -> Iterator[tuple[ValueRing, ExitStack]]:
    with ExitStack() as stack:
        stream = stack.enter_context(ComputeStream())
        ring = ValueRing(SimulatedGpu(), stream, slot_bytes=4096)
        stack.callback(ring.close)
        yield ring, stack


@pytest.mark.parametrize("seed", [1, 2])
def test_every_layer_waits_for_its_copies(seed: int) -> None:
    with fake_settings(max_delay_us=300, seed=seed), value_ring() as (ring, stack):
        graph = ring.capture()
        stack.callback(graph.close)
        assert not ring.wrong_layers(graph, 4)
        assert not ring.wrong_layers(graph, 2, at_once=3)


def test_without_the_wait_another_layer_is_read() -> None:
    with fake_settings(max_delay_us=300), value_ring() as (ring, stack):
        graph = ring.capture(wait=False)
        stack.callback(graph.close)
        assert ring.wrong_layers(graph, 4)
