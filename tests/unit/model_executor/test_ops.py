"""Wait and record as operators: kept in place by the compiler, visible to the profiler."""

from collections.abc import Iterator

import pytest
import torch

from vllm_dwdp.model_executor import ops


class RecordingRing:
    """Notes the order of calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def begin_forward(self) -> None:
        self.calls.append(("begin", -1))

    def wait(self, layer_index: int) -> None:
        self.calls.append(("wait", layer_index))

    def record(self, layer_index: int) -> None:
        self.calls.append(("record", layer_index))


@pytest.fixture
def ring() -> Iterator[RecordingRing]:
    made = RecordingRing()
    ops.install_rings([made])
    yield made
    ops.install_rings([])


def layers(hidden: torch.Tensor) -> torch.Tensor:
    for index in range(3):
        ops.wait_layer(hidden, 0, index)
        hidden = hidden * 2
        ops.record_layer(hidden, 0, index)
    return hidden


EXPECTED = [(kind, index) for index in range(3) for kind in ("wait", "record")]


def test_eager_calls_come_in_order(ring: RecordingRing) -> None:
    assert layers(torch.ones(4)).tolist() == [8.0] * 4
    assert ring.calls == EXPECTED


@pytest.mark.filterwarnings("ignore")
def test_the_compiler_neither_moves_nor_drops_them(ring: RecordingRing) -> None:
    compiled = torch.compile(layers, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        ring.calls.clear()
        assert compiled(torch.ones(4)).tolist() == [8.0] * 4
        assert ring.calls == EXPECTED


@pytest.mark.filterwarnings("ignore")
def test_while_a_profiler_runs_each_wait_is_a_named_range(ring: RecordingRing) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layers(torch.ones(4))
    names = {event.key for event in profile.key_averages()}
    assert {f"dwdp::wait ring 0 layer {index}" for index in range(3)} <= names
