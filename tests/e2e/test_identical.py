"""Tokens and assembled weights are those of one stock engine, whatever the model, group and mode.

The stock engine keeps all experts in ordinary tensors, so its weights are the plain concatenation.
Prefetch cases run with slots overwritten before each fill and every copy delayed at random: a layer
that did not wait would compute with 0xff.
"""

from pathlib import Path
from typing import Any

import pytest
from _pytest.mark import ParameterSet

from gpu_checks.checkpoints import ARCHITECTURES
from tests.e2e.conftest import Checkpoints, StockEngine
from tests.e2e.matrix import run_cases

pytestmark = pytest.mark.e2e

ON_PUSH = {"mixtral": 8, "gpt_oss": 8, "deepseek_v3": 8}
"""Families with a loader per expert, with fused tensors and biases, and with shared experts and MLA."""
OTHERS = {name: 8 for name in ARCHITECTURES if name not in ON_PUSH | {"dbrx": 8}}  # stock fails
FAMILIES = [
    pytest.param(ON_PUSH, id="three-families"),
    pytest.param(OTHERS, id="other-families", marks=pytest.mark.slow),
]
ROWS = {
    "qwen3_moe": "Qwen3-MoE",
    "qwen3_moe_mixed": "Qwen3-MoE with dense layers between",
    "qwen2_moe": "Qwen2-MoE",
    "mixtral": "Mixtral",
    "olmoe": "OLMoE",
    "granite_moe": "Granite-MoE",
    "glm4_moe": "GLM-4-MoE",
    "gpt_oss": "gpt-oss",
    "deepseek_v2": "DeepSeek-V2",
    "deepseek_v3": "DeepSeek-V3",
}


def with_rows(families: ParameterSet) -> ParameterSet:
    """Return the parameter, with a row for each family."""
    (listed,) = families.values
    marks = [*families.marks, pytest.mark.model(*(ROWS[name] for name in listed))]
    return pytest.param(listed, id=families.id, marks=marks)


Results = dict[str, list[dict[str, Any]]]


def cases(checkpoints: Checkpoints, experts: dict[str, int], **extra: Any) -> list[dict[str, Any]]:
    return [
        {"name": f"{name}-{count}", "model": checkpoints(name, count), **extra}
        for name, count in experts.items()
    ]


def named(case: dict[str, Any], addition: str) -> dict[str, Any]:
    return case | {"name": f"{case['name']}@{addition}"}


def run_and_check(
    stock: StockEngine,
    folder: Path,
    listed: list[dict[str, Any]],
    environment: dict[str, str] | None = None,
) -> Results:
    """Run the cases, compare each rank with a stock engine, and return the results."""
    references = stock.all([case["model"] for case in listed])
    results = run_cases(folder, "dwdp", listed, environment)
    for case in listed:
        reference = references[case["model"]]
        assert len(results[case["name"]]) == case["num_ranks"]
        for result in results[case["name"]]:
            where = f"{case['name']}, rank {result['rank']}"
            assert result["weights"] == reference["weights"], f"{where}: other weights"
            assert result["tokens"] == reference["tokens"], f"{where}: other tokens"
            status = result["status"]
            assert status["resident_expert_bytes"] > 0
            assert status["remote_expert_bytes"] > 0, f"{where}: DWDP did not run"
            if status["mode"] == "prefetch":
                # Every layer at least once; edges were copied before, once and for all.
                fetched = sum(status["fetched_bytes"].values())
                assert fetched > 0.9 * status["remote_expert_bytes"]
    return results


@pytest.mark.parametrize("families", FAMILIES)
def test_the_reference_is_not_degenerate(
    stock: StockEngine, checkpoints: Checkpoints, families: dict[str, int]
) -> None:
    models = [checkpoints(name, count) for name, count in families.items()]
    for model, result in stock.all(models).items():
        assert len({token for tokens in result["tokens"] for token in tokens}) > 5, model


@pytest.mark.every_version
@pytest.mark.timeout(600)
@pytest.mark.parametrize("families", [with_rows(each) for each in FAMILIES])
def test_two_ranks_direct_and_prefetch(
    stock: StockEngine, checkpoints: Checkpoints, tmp_path: Path, families: dict[str, int]
) -> None:
    both = [
        named(case, mode)
        for mode in ("auto", "prefetch")
        for case in cases(checkpoints, families, num_ranks=2, dwdp={"mode": mode})
    ]
    races = {"DWDP_DEBUG_POISON": "1", "DWDP_DEBUG_MAX_DELAY_US": "3000"}
    results = run_and_check(stock, tmp_path, both, races)
    statuses = [rank["status"] for ranks in results.values() for rank in ranks]
    assert {status["mode"] for status in statuses} == {"direct", "prefetch"}
    # Rings of no more layers than slots are filled once and hardly ever wait; the others must have.
    assert sum(status["late_prefetches"] for status in statuses) > 100, "the delays delayed nothing"


@pytest.mark.feature(
    "Experts that the ranks do not divide, and redundant ones (`experts_per_rank`)"
)
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("families", "redundant", "redundant_direct"),
    [
        pytest.param(ON_PUSH | {"gpt_oss": 7}, {"mixtral": 8}, {"mixtral": 8}, id="three-families"),
        pytest.param(
            {"qwen3_moe_mixed": 8},
            {"qwen3_moe": 10, "granite_moe": 8},
            {"qwen3_moe": 10},
            id="other-families",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_three_ranks_do_not_divide_the_experts(
    stock: StockEngine,
    checkpoints: Checkpoints,
    tmp_path: Path,
    families: dict[str, int],
    redundant: dict[str, int],
    redundant_direct: dict[str, int],
) -> None:
    prefetch = {"mode": "prefetch"}
    held = {"experts_per_rank": 5, "slice_bytes": 4096}
    listed = cases(checkpoints, families, num_ranks=3, dwdp=prefetch)
    for case in cases(checkpoints, redundant, num_ranks=3, dwdp=prefetch | held):
        listed.append(named(case, "redundant"))
    for case in cases(checkpoints, redundant_direct, num_ranks=3, dwdp={"experts_per_rank": 6}):
        listed.append(named(case, "redundant-direct"))
    run_and_check(stock, tmp_path, listed)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "families",
    [
        pytest.param({"gpt_oss": 7, "deepseek_v3": 8}, id="three-families"),
        pytest.param(
            {"qwen3_moe": 10, "qwen2_moe": 8, "olmoe": 8, "glm4_moe": 8},
            id="other-families",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_four_ranks_and_uneven_counts(
    stock: StockEngine, checkpoints: Checkpoints, tmp_path: Path, families: dict[str, int]
) -> None:
    run_and_check(stock, tmp_path, cases(checkpoints, families, num_ranks=4, dwdp={}))


@pytest.mark.feature("Preemption and aborts in large batches")
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("num_steps", "seed"), [(400, 2), pytest.param(2000, 1, marks=pytest.mark.slow)]
)
def test_many_steps_with_preemption_aborts_and_late_poisoned_copies(
    stock: StockEngine, checkpoints: Checkpoints, tmp_path: Path, num_steps: int, seed: int
) -> None:
    """The same batches in one stock engine and on both ranks give the same tokens."""
    model = checkpoints("qwen3_moe_mixed", 8)
    settings = {
        "soak": {"num_steps": num_steps, "seed": seed},
        "engine_args": {"max_num_seqs": 8, "num_gpu_blocks_override": 12},
    }
    expected = stock(model, **settings)
    assert expected["preempted"] > num_steps / 100
    assert expected["aborted"] > num_steps / 70
    assert expected["batches"] > 0.8 * num_steps
    dwdp = {"num_ranks": 2, "dwdp": {"mode": "prefetch", "slice_bytes": 16384}}
    # Long enough to be late even where a busy machine computes several times as slowly as usual.
    races = {"DWDP_DEBUG_POISON": "1", "DWDP_DEBUG_MAX_DELAY_US": "500"}
    case = {"name": "soak", "model": model} | settings | dwdp
    for result in run_cases(tmp_path, "dwdp", [case], races)["soak"]:
        for key in ("tokens", "preempted", "aborted", "batches"):
            assert result[key] == expected[key], key
        status = result["status"]
        assert status["late_prefetches"] > num_steps / 20, "the delays delayed nothing"
        fetched = sum(status["fetched_bytes"].values())
        assert fetched > 0.35 * num_steps * status["remote_expert_bytes"]
        assert status["steps"]["prefetch"] >= expected["batches"]
        assert status["forwards"] >= expected["batches"]
        assert status["unfinished_forwards"] == 0
