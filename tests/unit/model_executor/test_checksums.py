"""What `/weight_checker` says of experts is of the experts, whatever the slots hold."""

from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest
import torch
from vllm.model_executor.model_loader.weight_checksum import compute_tensor_digests

from gpu_checks.expert_ranks import ExpertShape, RankMemory, local_ranks, wrong_weights
from vllm_dwdp.compat.worker.checksums import of_layers
from vllm_dwdp.device.host import HostDevice
from vllm_dwdp.model_executor.routed_experts import Binding
from vllm_dwdp.model_executor.views import ExpertViews, bind_views
from vllm_dwdp.prefetch.mode_policy import Mode, ModePolicy

SHAPE = ExpertShape(num_experts=5, hidden_size=96, intermediate_size=64, top_k=2)
NUM_LAYERS = 5
PREFIX = "dp1:pp0:"
POLICIES = {"prefetch": ModePolicy.forced(Mode.PREFETCH), "auto": ModePolicy.by_tokens(4, None)}


class Layer(torch.nn.Module):
    """A layer whose parameters are over the view that is in place."""

    top_k = 2

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layer_name = name

    def use(self, binding: Binding) -> None:
        for name, (_, placed) in zip(SHAPE.weights, binding.tensors, strict=True):
            setattr(self, name, torch.nn.Parameter(placed, requires_grad=False))


@pytest.fixture
def rank() -> Iterator[RankMemory]:
    device = HostDevice()
    with closing(device), local_ranks(device, SHAPE, NUM_LAYERS, 3) as ranks:
        for entry in ranks[1].shard.published:
            entry.layer = Layer(entry.layer.layer_name)
        yield ranks[1]


def digests_of(model: torch.nn.Module) -> dict[str, str]:
    """Return what stock vLLM says, with its prefix of a rank."""
    return {PREFIX + name: each for name, each in compute_tensor_digests(model).items()}


def expected(rank: RankMemory) -> dict[str, str]:
    whole: Any = torch.nn.ModuleList()
    for number in range(NUM_LAYERS):
        layer = torch.nn.Module()
        for name, tensor in rank.whole(number).items():
            setattr(layer, name, torch.nn.Parameter(tensor, requires_grad=False))
        whole.append(layer)
    return digests_of(whole)


@pytest.mark.parametrize("policy", POLICIES)
def test_checksums_are_those_of_all_experts(rank: RankMemory, policy: str) -> None:
    model = torch.nn.ModuleList([entry.layer for entry in rank.shard.published])
    with ExitStack() as undo:
        views = bind_views(rank.mapper(), POLICIES[policy], None, undo)
        views.begin_forward(9)
        views.begin_forward(9)
        of_slots = digests_of(model)
        assert of_slots != expected(rank), "slots hold two layers; nothing is to be repaired here"
        found = of_slots | of_layers(of_slots, model, views.whole_layers())
        assert found == expected(rank)
        check_the_next_forward(rank, views)


def check_the_next_forward(rank: RankMemory, views: ExpertViews) -> None:
    """Its ring does not believe in what the checksums have left in the slots."""
    assert views.rings is not None
    assert views.begin_forward(9) is Mode.PREFETCH
    (ring,) = views.rings.rings
    for number in range(NUM_LAYERS):
        ring.wait(number)
        assert wrong_weights(views.rings.views[number], rank.whole(number)) == []
        ring.record(number)


def test_layers_of_another_model_are_passed_over(rank: RankMemory) -> None:
    """A drafter's layers are among those of a rank, and not in the model that is checked."""
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    assert of_layers(digests_of(model), model, [torch.nn.Linear(2, 2)]) == {}
