"""The seam to captured graphs: every capture and launch is told to every ring, and undone after."""

import gc
import weakref
from typing import ClassVar

import torch

from vllm_dwdp.compat.worker.cuda_graphs import followed_by
from vllm_dwdp.prefetch.captured_ring import RingGraph


class StandInGraph:
    """In the place of `torch.cuda.CUDAGraph`, which needs a GPU to be made."""

    calls: ClassVar[list[str]] = []

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global") -> None:
        self.calls.append(f"capture_begin {capture_error_mode}")

    def capture_end(self) -> None:
        self.calls.append("capture_end")

    def replay(self) -> None:
        self.calls.append("replay")


class NotingRing:
    def __init__(self, needs: list[int]) -> None:
        self.needs = needs

    def begin_capture(self) -> None:
        StandInGraph.calls.append("ring begins")

    def end_capture(self) -> RingGraph:
        StandInGraph.calls.append("ring ends")
        return RingGraph(needs=self.needs)

    def before_launch(self, graph: RingGraph) -> None:
        StandInGraph.calls.append(f"before {graph.needs}")

    def after_launch(self, graph: RingGraph) -> None:
        StandInGraph.calls.append(f"after {graph.needs}")


def test_rings_hear_of_captures_and_launches_in_order() -> None:
    calls = StandInGraph.calls
    stock = StandInGraph.replay
    with followed_by([NotingRing([0, 1])], StandInGraph):
        graph, other = StandInGraph(), StandInGraph()
        graph.capture_begin(capture_error_mode="relaxed")
        graph.capture_end()
        assert calls == ["ring begins", "capture_begin relaxed", "ring ends", "capture_end"]
        calls.clear()
        graph.replay()
        other.replay()
        assert calls == ["before [0, 1]", "replay", "after [0, 1]", "replay"]
    calls.clear()
    graph.replay()
    assert calls == ["replay"]
    assert StandInGraph.replay is stock
    calls.clear()


def test_a_graph_without_layers_costs_nothing_and_graphs_are_not_kept_alive() -> None:
    calls = StandInGraph.calls
    with followed_by([NotingRing([]), NotingRing([])], StandInGraph):
        graph = StandInGraph()
        graph.capture_begin()
        graph.capture_end()
        calls.clear()
        graph.replay()
        assert calls == ["replay"]
        gone = weakref.ref(graph)
        del graph
        gc.collect()
        assert gone() is None
    calls.clear()


def test_torchs_graph_class_has_the_seam() -> None:
    stock = torch.cuda.CUDAGraph.replay
    with followed_by([]):
        assert torch.cuda.CUDAGraph.replay is not stock
        assert torch.cuda.CUDAGraph.replay.__wrapped__ is stock
    assert torch.cuda.CUDAGraph.replay is stock
