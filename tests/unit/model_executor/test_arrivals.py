"""What ranks were given in an update: any byte that differs tells them apart, of experts too."""

import pytest
import torch

from vllm_dwdp.model_executor.arrivals import Arrivals

NAMES = ("model.layers.3.mlp.experts.5.down_proj.weight", "model.norm.weight")
SHAPE = (3, 1500)
"""4,500 bytes: more than a page, and no whole number of words."""


def identity(name: str, tensor: torch.Tensor) -> str:
    arrivals = Arrivals("before")
    arrivals.note(name, tensor)
    return arrivals.identity()


def content() -> torch.Tensor:
    return (torch.arange(4500) * 7 % 251).to(torch.uint8).view(SHAPE)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("position", [0, 4095, 4096, 4495, 4499])
def test_any_byte_that_differs_is_seen(name: str, position: int) -> None:
    other = content()
    other.view(-1)[position] ^= 1
    assert identity(name, content()) != identity(name, other)


def test_where_the_bytes_lie_does_not_count() -> None:
    apart = torch.zeros(3, 3000, dtype=torch.uint8)[:, ::2]
    apart.copy_(content())
    unaligned = torch.zeros(4501, dtype=torch.uint8)[1:].view(SHAPE)
    unaligned.copy_(content())
    assert unaligned.data_ptr() % 8
    for same in (apart, unaligned):
        assert identity(NAMES[0], same) == identity(NAMES[0], content())


def test_what_the_bytes_mean_counts() -> None:
    """The same bytes as other numbers, in another shape or under another name are other weights."""
    same = content()
    others = [same.view(torch.int8), same.view(1500, 3), same.view(torch.float8_e4m3fn)]
    assert len({identity(NAMES[0], each) for each in (same, *others)}) == 4
    assert identity(NAMES[0], same) != identity(NAMES[1], same)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (8,)])
def test_small_tensors_have_an_identity(shape: tuple[int, ...]) -> None:
    one, two = torch.full(shape, 1.5), torch.full(shape, 2.5)
    assert (identity(NAMES[0], one) == identity(NAMES[0], two)) == (one.numel() == 0)


def test_only_names_are_wanted_of_a_checkpoint() -> None:
    arrivals = Arrivals("")
    arrivals.note(NAMES[0], content())
    assert arrivals.digests == {NAMES[0]: b""}
