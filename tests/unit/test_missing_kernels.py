"""The stand-ins for kernels that vLLM lacks on CPUs: how they are named, and the rules of some."""

import pytest
import torch

from tests.helpers.missing_kernels import NAMES, PLUGINS, environment, said
from tests.helpers.missing_kernels.chosen_tokens import attend as attend_to
from tests.helpers.missing_kernels.chosen_tokens import best, packed, unpacked
from tests.helpers.missing_kernels.delta import attend
from tests.helpers.missing_kernels.ngrams import ids_of_ngrams
from tests.helpers.missing_kernels.pools import rotated, tokens_of
from vllm_dwdp.planner.cache_parts import index_bytes


def test_programs_find_the_plugin_and_the_names_beside_what_they_have() -> None:
    found = environment(("mamba_1", "zero_experts"), {"PYTHONPATH": "/theirs", "OTHER": "1"})
    assert found["PYTHONPATH"].split(":")[1:] == [str(PLUGINS), "/theirs"]
    assert (found[NAMES], found["OTHER"]) == ("mamba_1,zero_experts", "1")
    assert list(PLUGINS.glob("*.dist-info/entry_points.txt"))
    assert said(("mamba_1", "zero_experts")) == "with mamba 1 and zero experts in torch"
    assert said(("the_names_of_experts",)) == "with the names of experts mended"


def test_a_key_of_the_delta_rule_knows_what_it_was_told_last() -> None:
    size = 4
    keys, values = torch.eye(size)[:, None], torch.rand(size, 1, size)
    nothing_forgotten, all_of_it = torch.full((size, 1, size), -1e3), torch.full((size, 1), 1e3)
    given = keys, keys, values, nothing_forgotten, all_of_it, torch.zeros(1), torch.zeros(size)
    seen, state = attend(*given, torch.zeros(1, size, size))
    assert torch.allclose(seen, values / size**0.5)
    assert torch.allclose(state[0], values[:, 0])
    told_again = keys, keys, values + 1, *given[3:]
    assert torch.allclose(attend(*told_again, state)[1][0], values[:, 0] + 1)


def test_with_a_bound_a_state_forgets_no_more_than_it_says() -> None:
    tokens = [torch.zeros(1, 1, 4) for _ in range(3)]
    all_of_it, told_nothing = torch.full((1, 1, 4), 1e3), torch.full((1, 1), -1e3)
    given = *tokens, all_of_it, told_nothing, torch.zeros(1), torch.zeros(4), torch.ones(1, 4, 4)
    assert torch.allclose(attend(*given, -1.0)[1], torch.ones(4, 4) * torch.tensor(-1.0).exp())
    assert attend(*given)[1].max() == 0


def test_an_indexed_key_has_the_bytes_that_the_planner_counts() -> None:
    keys = torch.randn(7, 128) * torch.logspace(-3, 3, 7)[:, None]
    rows = packed(keys)
    counted = index_bytes(128)
    assert (rows.dtype, rows.shape) == (torch.uint8, (7, counted))
    largest = keys.abs().amax(-1, keepdim=True)
    assert ((unpacked(rows, 128) - keys).abs() <= largest / 16).all()


def test_the_best_keys_are_those_that_a_query_sees_and_scores_highest() -> None:
    keys = torch.eye(6, 8)
    q = torch.eye(6, 8)[[2, 4, 5]].unsqueeze(1) + 0.1 * torch.eye(6, 8)[[1, 1, 0]].unsqueeze(1)
    places = best(q, torch.ones(3, 1), keys, torch.tensor([3, 3, 1]), 2).tolist()
    assert places[0] == [2, 1]
    assert places[1][0] == 1 and 4 not in places[1], "it comes later"
    assert places[2] == [0, -1], "there is no other"
    negative = best(q, -torch.ones(3, 1), keys, torch.tensor([3, 3, 3]), 2).tolist()
    assert 2 not in negative[0], "a head's weight may be negative"


def test_attention_to_all_tokens_is_dense_and_to_chosen_ones_is_not() -> None:
    q, latents = torch.randn(2, 3, 8), torch.randn(5, 8)
    everything = torch.arange(5).expand(2, 5)
    dense = (q @ latents.T * 0.5).softmax(-1) @ latents[:, :6]
    assert torch.allclose(attend_to(q, latents, everything, 6, 0.5), dense, atol=1e-5)
    padded = torch.nn.functional.pad(everything, (0, 3), value=-1)
    assert torch.allclose(attend_to(q, latents, padded, 6, 0.5), dense, atol=1e-5)
    one = torch.tensor([[3, -1], [0, -1]])
    alone = latents[[3, 0], None, :6].expand(2, 3, 6)
    assert torch.allclose(attend_to(q, latents, one, 6, 0.5), alone, atol=1e-5)
    sinks = torch.full((3,), 30.0)
    assert attend_to(q, latents, one, 6, 0.5, sinks).abs().max() < 1e-6, "a sink takes the rest"


def test_a_query_sees_the_tokens_of_its_pools_and_of_the_open_one() -> None:
    pools = torch.tensor([[1, 0], [0, -1], [-1, -1]], dtype=torch.int32)
    places = tokens_of(pools, torch.tensor([10, 4, 3]), 4).tolist()
    assert places[0] == [4, 5, 6, 7, 0, 1, 2, 3, 8, 9, -1]
    assert places[1] == [0, 1, 2, 3, *[-1] * 7]
    assert places[2] == [*[-1] * 8, 0, 1, 2]


def test_a_rotation_keeps_products() -> None:
    q, k = torch.randn(2, 3, 128)
    assert torch.allclose(rotated(q) @ rotated(k).T, q @ k.T, atol=1e-4)
    assert not torch.allclose(rotated(q), q)


def test_ids_of_ngrams_end_at_the_start_of_a_request_and_at_a_negative_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two requests of a vocabulary of 10, with one table of pairs and one of triples."""
    from vllm import _custom_ops

    monkeypatch.setattr(_custom_ops, "ngram_compute_n_gram_ids", None)
    ids_of_ngrams()
    powers = torch.tensor([[[1, 10, 100]], [[1, 10, 100]]])
    sizes, first_rows = torch.tensor([[101], [103]]), torch.tensor([0, 101, 204])
    tokens = torch.tensor([[-1, -1, 3, 4, 5], [7, 8, 9, -2, 6]])
    ids = torch.empty(6, 2, dtype=torch.int32)
    _custom_ops.ngram_compute_n_gram_ids(
        *(3, 1, powers, sizes, first_rows, torch.tensor([0, 3, 6]), tokens),
        *(torch.tensor([0, 1]), torch.tensor([2, 2]), ids),
    )
    pairs = [3, 4 + 30, 5 + 40, 9 + 80, 0, 6]
    triples = [3, 4 + 30, (5 + 40 + 300) % 103, (9 + 80 + 700) % 103, 0, 6]
    assert ids[:, 0].tolist() == pairs
    assert (ids[:, 1] - 101).tolist() == triples
