"""Tokens and assembled weights are those of one stock engine, whatever the model, group and mode.

The stock engine keeps all experts in ordinary tensors, so its weights are the plain concatenation.
Prefetch cases run with slots overwritten before each fill and every copy delayed at random: a layer
that did not wait would compute with 0xff.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from gpu_checks.checkpoints import ARCHITECTURES
from tests.e2e.conftest import Checkpoints
from tests.e2e.matrix import run_cases

pytestmark = pytest.mark.e2e

EIGHT = {name: 8 for name in ARCHITECTURES if name != "dbrx"}  # refused, see test_refusals
UNEVEN = {"qwen3_moe": 10, "gpt_oss": 7}
Results = dict[str, list[dict[str, Any]]]


def cases(checkpoints: Checkpoints, experts: dict[str, int], **extra: Any) -> list[dict[str, Any]]:
    return [
        {"name": f"{name}-{count}", "model": checkpoints(name, count), **extra}
        for name, count in experts.items()
    ]


@pytest.fixture(scope="module")
def stock(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Two engines beside each other, with half of the models each."""
    folder = tmp_path_factory.mktemp("stock")
    listed = cases(checkpoints, EIGHT) + cases(checkpoints, UNEVEN)
    with ThreadPoolExecutor(2) as pool:
        halves = pool.map(lambda half: run_cases(folder, f"stock-{half}", listed[half::2]), (0, 1))
        return {name: results for half in halves for name, results in half.items()}


def check(stock: Results, results: Results, num_ranks: int) -> None:
    for name, ranks in results.items():
        reference = stock[name.partition("@")[0]][0]
        assert len(ranks) == num_ranks
        for result in ranks:
            where = f"{name}, rank {result['rank']}"
            assert result["weights"] == reference["weights"], f"{where}: other weights"
            assert result["tokens"] == reference["tokens"], f"{where}: other tokens"
            status = result["status"]
            assert status["resident_expert_bytes"] > 0
            assert status["remote_expert_bytes"] > 0, f"{where}: DWDP did not run"
            if status["mode"] == "prefetch":
                # Every layer at least once; edges were copied before, once and for all.
                fetched = sum(status["fetched_bytes"].values())
                assert fetched > 0.9 * status["remote_expert_bytes"]


def test_the_reference_is_not_degenerate(stock: Results) -> None:
    for name, (result,) in stock.items():
        assert len({token for tokens in result["tokens"] for token in tokens}) > 5, name


@pytest.mark.timeout(600)
def test_two_ranks_direct_and_prefetch(
    stock: Results, checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("two")
    both = []
    for mode in ("auto", "prefetch"):
        for case in cases(checkpoints, EIGHT, num_ranks=2, dwdp={"mode": mode}):
            both.append(case | {"name": f"{case['name']}@{mode}"})
    races = {"DWDP_DEBUG_POISON": "1", "DWDP_DEBUG_MAX_DELAY_US": "3000"}
    results = run_cases(folder, "two", both, races)
    check(stock, results, num_ranks=2)
    statuses = [rank["status"] for ranks in results.values() for rank in ranks]
    assert {status["mode"] for status in statuses} == {"direct", "prefetch"}
    # Rings of no more layers than slots are filled once and hardly ever wait; the others must have.
    assert sum(status["late_prefetches"] for status in statuses) > 100, "the delays delayed nothing"


@pytest.mark.timeout(600)
def test_three_ranks_do_not_divide_the_experts(
    stock: Results, checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("three")
    models = {"qwen3_moe_mixed": 8, "mixtral": 8, "gpt_oss": 7, "deepseek_v3": 8}
    listed = [
        *cases(checkpoints, models, num_ranks=3, dwdp={"mode": "prefetch"}),
        *(
            case | {"name": f"{case['name']}@redundant"}
            for case in cases(
                checkpoints,
                {"qwen3_moe": 10, "granite_moe": 8},
                num_ranks=3,
                dwdp={"mode": "prefetch", "experts_per_rank": 5, "slice_bytes": 4096},
            )
        ),
        *(
            case | {"name": f"{case['name']}@redundant-direct"}
            for case in cases(
                checkpoints, {"qwen3_moe": 10}, num_ranks=3, dwdp={"experts_per_rank": 6}
            )
        ),
    ]
    results = run_cases(folder, "three", listed)
    check(stock, results, num_ranks=3)


@pytest.mark.timeout(600)
def test_four_ranks_and_uneven_counts(
    stock: Results, checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("four")
    listed = cases(
        checkpoints, UNEVEN | {"qwen2_moe": 8, "olmoe": 8, "glm4_moe": 8}, num_ranks=4, dwdp={}
    )
    check(stock, run_cases(folder, "four", listed), num_ranks=4)


@pytest.mark.timeout(600)
def test_thousands_of_steps_with_preemption_aborts_and_late_poisoned_copies(
    checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The same batches in one stock engine and on both ranks give the same tokens."""
    folder = tmp_path_factory.mktemp("soak")
    case = {
        "name": "soak",
        "model": checkpoints("qwen3_moe_mixed", 8),
        "soak": {"num_steps": 2000, "seed": 1},
        "engine_args": {"max_num_seqs": 8, "num_gpu_blocks_override": 12},
    }
    (stock,) = run_cases(folder, "stock", [case])["soak"]
    assert stock["preempted"] > 20
    assert stock["aborted"] > 30
    assert stock["batches"] > 1600
    dwdp = {"num_ranks": 2, "dwdp": {"mode": "prefetch", "slice_bytes": 16384}}
    # Long enough to be late even where a busy machine computes several times as slowly as usual.
    races = {"DWDP_DEBUG_POISON": "1", "DWDP_DEBUG_MAX_DELAY_US": "500"}
    for result in run_cases(folder, "dwdp", [case | dwdp], races)["soak"]:
        for key in ("tokens", "preempted", "aborted", "batches"):
            assert result[key] == stock[key], key
        status = result["status"]
        assert status["late_prefetches"] > 100, "the delays delayed nothing"
        assert sum(status["fetched_bytes"].values()) > 700 * status["remote_expert_bytes"]
        assert status["steps"]["prefetch"] >= stock["batches"]
        assert status["forwards"] >= stock["batches"]
        assert status["unfinished_forwards"] == 0
