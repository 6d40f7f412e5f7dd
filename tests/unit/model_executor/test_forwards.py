"""What is counted is what ran: eager forwards at their hook, captured ones when they are launched."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from vllm.compilation.breakable_cudagraph import BreakableCUDAGraphCapture
from vllm.forward_context import BatchDescriptor, ForwardContext, override_forward_context

from vllm_dwdp.compat.worker.cuda_graphs import followed_by
from vllm_dwdp.model_executor.forwards import Forwards, couple
from vllm_dwdp.model_executor.views import ExpertViews
from vllm_dwdp.prefetch.mode_policy import Mode, ModePolicy


class Layer:
    """Serves from whatever binding it was last told to use."""

    serves_from = "prefetch"

    def use(self, binding: str) -> None:
        self.serves_from = binding


class Entry:
    def __init__(self) -> None:
        self.layer = Layer()


class StandInGraph:
    """In the place of `torch.cuda.CUDAGraph`: a launch runs none of the model's Python."""

    def capture_begin(self) -> None: ...

    def capture_end(self) -> None: ...

    def replay(self) -> None: ...


class Setting:
    """A model of one layer that reads in place up to four tokens."""

    def __init__(self, undo: ExitStack) -> None:
        self.entry = Entry()
        layers: Any = [self.entry]
        bindings: Any = {Mode.DIRECT: ["direct"], Mode.PREFETCH: ["prefetch"]}
        self.views = ExpertViews(
            layers, bindings, ModePolicy(direct_max_tokens=4, reason="a test"), None
        )
        self.model = torch.nn.Identity()
        self.forwards: Forwards = couple(self.model, self.views, captures_graphs=False, undo=undo)
        undo.enter_context(followed_by([self.forwards], StandInGraph))

    def forward(self, num_tokens: int) -> None:
        self.model(torch.zeros(num_tokens, dtype=torch.int32))

    def capture(self, num_tokens: int) -> StandInGraph:
        graph = StandInGraph()
        graph.capture_begin()
        self.forward(num_tokens)
        graph.capture_end()
        return graph


@pytest.fixture
def setting() -> Iterator[Setting]:
    with ExitStack() as undo:
        yield Setting(undo)


def test_each_forward_runs_in_the_view_for_its_tokens_and_counts_as_that(setting: Setting) -> None:
    served = []
    for num_tokens in (1, 4, 5, 100, 2):
        setting.forward(num_tokens)
        served.append(setting.entry.layer.serves_from)
    assert served == ["direct", "direct", "prefetch", "prefetch", "direct"]
    assert setting.forwards.by_mode == {Mode.DIRECT: 3, Mode.PREFETCH: 2}
    assert setting.views.mode is Mode.DIRECT


def test_a_switch_that_does_nothing_shows_in_the_count(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setting.views, "_use", lambda mode: None)
    setting.forward(1)
    assert setting.forwards.by_mode == {Mode.DIRECT: 0, Mode.PREFETCH: 1}


def test_a_captured_forward_counts_at_every_launch_in_the_mode_that_it_holds(
    setting: Setting,
) -> None:
    small, large = setting.capture(4), setting.capture(8)
    assert not any(setting.forwards.by_mode.values()), "while a graph is captured nothing runs"
    setting.forward(1)  # another view is in place now
    for graph in (large, small, large):
        graph.replay()
    assert setting.forwards.by_mode == {Mode.DIRECT: 2, Mode.PREFETCH: 2}


def test_the_pieces_of_a_forward_are_not_counted_again(setting: Setting) -> None:
    piece = StandInGraph()
    piece.capture_begin()
    piece.capture_end()
    setting.model.register_forward_hook(lambda *_: [piece.replay() for _ in range(3)] and None)
    setting.forward(1)
    assert setting.forwards.by_mode == {Mode.DIRECT: 1, Mode.PREFETCH: 0}


def test_a_breakable_graph_counts_once_at_every_replay(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own capture: several graphs hold one forward, whose hook runs in the first of them."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandInGraph)
    capture, attended = BreakableCUDAGraphCapture(), []
    setting.model.register_forward_hook(
        lambda *_: capture.add_eager(lambda: attended.append(1)) and None
    )
    with capture:
        setting.forward(8)
    assert (capture.num_graphs, capture.num_eager_breaks) == (2, 1)
    assert not any(setting.forwards.by_mode.values()), "while it is captured nothing runs"
    for _ in range(3):
        capture.replay()
    assert setting.forwards.by_mode == {Mode.DIRECT: 0, Mode.PREFETCH: 3}
    assert len(attended) == 4


def test_vllm_says_how_many_tokens_a_padded_forward_computes(setting: Setting) -> None:
    context = ForwardContext(
        no_compile_layers={},
        attn_metadata={},
        slot_mapping={},
        batch_descriptor=BatchDescriptor(num_tokens=8),
    )
    with override_forward_context(context):
        setting.forward(3)
    assert setting.forwards.by_mode == {Mode.DIRECT: 0, Mode.PREFETCH: 1}


def test_a_forward_that_fails_has_ended(setting: Setting) -> None:
    setting.model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        setting.forward(1)
    assert (setting.forwards.begun, setting.forwards.ended) == (1, 1)
