"""Both views of a layer that was loaded: what follows a switch, and what would not."""

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.unit.model_executor.stand_in import Loaded
from vllm_dwdp.errors import DwdpUnsupportedError
from vllm_dwdp.model_executor.routed_experts import Binding, RingPosition
from vllm_dwdp.model_executor.views import ExpertViews
from vllm_dwdp.prefetch.mode_policy import Mode, ModePolicy


@pytest.fixture
def loaded() -> Any:
    with ExitStack() as undo:
        made = Loaded(0).process()
        undo.callback(made.close)
        yield made


def binding(loaded: Loaded, value: int) -> Binding:
    """Return a view in which every expert is `value`."""
    (weight,) = loaded.shard.published[0].weights
    rows = torch.full((weight.layout.num_bytes,), value, dtype=torch.uint8)
    return Binding(
        tensors=tuple((placed.tensor, placed.over(rows)) for placed in weight.tensors),
        ring_position=None,
    )


def make_views(loaded: Loaded, *modes: Mode) -> ExpertViews:
    bindings = {mode: [binding(loaded, number)] for number, mode in enumerate(modes)}
    loaded.layer.use(bindings[modes[-1]][0])
    policy = ModePolicy(direct_max_tokens=4, reason="a test")
    if len(modes) == 1:
        policy = ModePolicy.forced(modes[0])
    return ExpertViews(loaded.shard.published, bindings, policy, None)


def test_the_parameters_follow_every_switch(loaded: Loaded) -> None:
    views = make_views(loaded, Mode.DIRECT, Mode.PREFETCH)
    parameter = loaded.layer.w13_weight
    for num_tokens, value in ((1, 0), (9, 1), (2, 0)):
        views.begin_forward(num_tokens)
        assert loaded.layer.w13_weight is parameter
        assert (parameter.data.view(torch.uint8) == value).all()


def test_a_switch_sets_each_shared_tensor_once_and_no_attribute_of_a_module(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs between two steps, on the thread that launches them."""
    views = make_views(loaded, Mode.DIRECT, Mode.PREFETCH)
    (pairs,) = [listed[0].tensors for mode, listed in views._bindings.items() if mode == "direct"]
    assert [tensor for tensor, _ in pairs] == [loaded.layer.w13_weight], "no alias, no scale"

    def set_attribute(module: torch.nn.Module, name: str, value: object) -> None:
        pytest.fail(f"{name} was set through the module")

    monkeypatch.setattr(torch.nn.Module, "__setattr__", set_attribute)
    position = RingPosition(0, 3)
    bindings: Any = views._bindings[Mode.PREFETCH]
    bindings[0] = replace(bindings[0], ring_position=position)
    for num_tokens, expected in ((1, None), (9, position), (1, None)):
        views.begin_forward(num_tokens)
        assert loaded.layer.ring_position is expected


def test_what_a_first_forward_makes_over_the_experts_is_found(loaded: Loaded) -> None:
    views = make_views(loaded, Mode.DIRECT, Mode.PREFETCH)
    views.check_all_follow()
    loaded.layer.quant_method.harmless = torch.ones(3)
    views.check_all_follow()
    loaded.layer.quant_method.cached = loaded.layer.w13_weight.data[1:]
    with pytest.raises(DwdpUnsupportedError, match=r"experts: quant_method.cached was made over"):
        views.check_all_follow()


def test_with_one_view_it_may_stay_where_it_is(loaded: Loaded) -> None:
    views = make_views(loaded, Mode.DIRECT)
    loaded.layer.quant_method.cached = loaded.layer.w13_weight.data[1:]
    views.check_all_follow()
