"""Speculative decoding gives the tokens of stock vLLM, and has as many drafts accepted.

Tokens alone would not show a wrong expert of a drafter, because the target corrects whatever is drafted.
So these drafters are made such that most of their drafts are accepted (`drafters.py`).
"""

from pathlib import Path
from typing import Any

import pytest

from tests.e2e import drafters
from tests.e2e.conftest import Checkpoints, StockEngine
from tests.e2e.matrix import run_cases
from tests.helpers import weight_files

pytestmark = [pytest.mark.e2e, pytest.mark.every_version, pytest.mark.timeout(600)]

RACES = {"DWDP_DEBUG_POISON": "1", "DWDP_DEBUG_MAX_DELAY_US": "3000"}
DRIVE = {
    "drive": "tests.e2e.drafters:speculate",
    "report": "tests.e2e.drafters:ring_traffic",
    "log_stats": True,
    "max_tokens": 24,
}
MTP = {"method": "mtp", "num_speculative_tokens": 2}
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_min": 2,
    "prompt_lookup_max": 3,
}
Result = dict[str, Any]


@pytest.fixture(scope="module")
def source(checkpoints: Checkpoints) -> str:
    return checkpoints("glm4_moe", 8, first_k_dense_replace=0)


@pytest.fixture(scope="module")
def model(source: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return drafters.make_target(tmp_path_factory.mktemp("targets") / "target", source)


def run_both(
    stock: StockEngine,
    folder: Path,
    model: str,
    *modes: str,
    environment: dict[str, str] | None = None,
    **case: Any,
) -> tuple[Result, list[Result]]:
    """Return a stock engine's result, and those of both ranks in some modes, with equal tokens."""
    expected = stock.all([model], environment, **DRIVE, **case)[model]
    ranks: list[Result] = []
    for mode in modes:  # a process that has drafted n-grams makes no second engine in vLLM 0.32
        ours = {"name": mode, "model": model, "num_ranks": 2, "dwdp": {"mode": mode}}
        ranks += run_cases(folder, mode, [ours | DRIVE | case], RACES | (environment or {}))[mode]
    for result in ranks:
        assert result["tokens"] == expected["tokens"], (result["name"], result["rank"])
        assert result["status"]["remote_expert_bytes"] > 0
    return expected, ranks


def check_counted(expected: Result, ranks: list[Result], least_accepted: float) -> None:
    """Each rank drafted and accepted what stock vLLM did, and that is no small part."""
    drafted, accepted = (expected["counted"][key] for key in ("draft_tokens", "accepted_tokens"))
    assert 0 < least_accepted * drafted < accepted <= drafted
    assert [result["counted"] for result in ranks] == [expected["counted"]] * len(ranks)


def spec(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"engine_args": {"speculative_config": arguments}}


@pytest.mark.feature("Speculative decoding: MTP")
def test_mtp_with_experts(stock: StockEngine, model: str, tmp_path: Path) -> None:
    expected, ranks = run_both(stock, tmp_path, model, "direct", "prefetch", **spec(MTP))
    check_counted(expected, ranks, least_accepted=0.5)
    for result in ranks[2:]:
        target, drafter = result["fetched"]
        assert target > 10 * drafter
        assert drafter == result["remote_bytes"][1], "one layer, fetched once and for all"


@pytest.mark.feature("Speculative decoding: MTP")
def test_a_wrong_remote_expert_of_a_drafter_would_be_seen(
    stock: StockEngine, model: str, tmp_path: Path
) -> None:
    """The control for the counts above: rank 1 shares a drafter's expert of zeros."""
    wrong = ["vllm_dwdp.compat.worker.moe:complete", "tests.e2e.planted:loses_a_drafters_expert"]
    case = {"name": "wrong", "model": model, "num_ranks": 2, "dwdp": {"mode": "direct"}}
    expected = stock(model, **DRIVE, **spec(MTP))
    results = run_cases(tmp_path, "wrong", [case | DRIVE | spec(MTP) | {"replace": wrong}])
    for result in results["wrong"]:
        assert result["tokens"] == expected["tokens"], "the target corrects what is drafted"
        assert result["counted"]["accepted_tokens"] < expected["counted"]["accepted_tokens"]


@pytest.mark.feature("weight transfer (start, update, finish)")
def test_a_drafter_gets_new_weights_of_its_own(
    stock: StockEngine, model: str, tmp_path: Path
) -> None:
    """Experts of a drafter on all ranks are those that were sent; the target keeps its own."""
    layer = 3
    poor = drafters.lose_experts(tmp_path / "poor", model, layer)
    few, many = (stock(path, **DRIVE, **spec(MTP)) for path in (poor, model))
    assert few["tokens"] == many["tokens"]
    renewed = DRIVE | {"drive": "tests.e2e.drafters:renew_and_speculate"}
    case = renewed | {"name": "prefetch", "model": poor, "num_ranks": 2}
    case |= {"dwdp": {"mode": "prefetch"}, "drafter": model, "drafter_layer": layer}
    transfer = {"weight_transfer_config": {"backend": weight_files.NAME}}
    case |= {"prepare": "tests.helpers.weight_files:register"}
    case["engine_args"] = spec(MTP)["engine_args"] | transfer
    ranks = run_cases(tmp_path, "drafter", [case])["prefetch"]
    assert len(ranks) == 2
    for rank in ranks:
        assert rank["tokens"] == rank["tokens_after"] == many["tokens"]
        assert rank["counted"] == few["counted"]
        assert rank["counted_after"] == many["counted"]
        assert rank["status"]["weight_update"] == 1
    accepted = [rank["counted"]["accepted_tokens"], rank["counted_after"]["accepted_tokens"]]
    assert accepted[1] > 1.2 * accepted[0]


def test_a_drafter_that_does_not_run_copies_nothing(
    stock: StockEngine, model: str, tmp_path: Path
) -> None:
    """No sequence fits into this drafter, so that vLLM never runs it."""
    never = MTP | {"max_model_len": 2}
    expected, ranks = run_both(stock, tmp_path, model, "prefetch", **spec(never))
    assert expected["counted"]["accepted_tokens"] == 0
    for result in ranks:
        target, drafter = result["fetched"]
        assert target > 0
        assert drafter == 0


@pytest.mark.slow
@pytest.mark.feature("Speculative decoding: n-gram")
def test_ngram(stock: StockEngine, model: str, tmp_path: Path) -> None:
    expected, ranks = run_both(stock, tmp_path, model, "direct", "prefetch", **spec(NGRAM))
    check_counted(expected, ranks, least_accepted=0.2)


@pytest.mark.slow
@pytest.mark.feature("Speculative decoding: Eagle")
def test_a_dense_eagle_head(stock: StockEngine, source: str, tmp_path: Path) -> None:
    model = drafters.make_target(tmp_path / "target", source, first_layer=drafters.OTHER_LAYERS)
    head = drafters.make_dense_eagle(tmp_path / "head", model)
    eagle = {"method": "eagle", "model": head, "num_speculative_tokens": 2}
    expected, ranks = run_both(stock, tmp_path, model, "direct", "prefetch", **spec(eagle))
    check_counted(expected, ranks, least_accepted=0.1)
    assert [len(result["fetched"]) for result in ranks] == [0, 0, 1, 1], "it has no ring"


@pytest.mark.slow
@pytest.mark.feature("Speculative decoding: Eagle with experts")
def test_an_eagle_head_with_experts(
    stock: StockEngine, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """Of DeepSeek, whose layers are experts in the head too.

    A prompt may not be longer than a step: on CPUs vLLM 0.32 computes MLA prompts whole, and with a
    drafter it never schedules a longer one.
    """
    source = checkpoints("deepseek_v3", 8, first_k_dense_replace=0)
    model = drafters.make_target(tmp_path / "target", source)
    head = drafters.make_expert_eagle(tmp_path / "head", model)
    eagle = {"method": "eagle", "model": head, "num_speculative_tokens": 2}
    case = {"engine_args": {"speculative_config": eagle, "max_num_batched_tokens": 512}}
    expected, ranks = run_both(stock, tmp_path, model, "direct", "prefetch", **case)
    check_counted(expected, ranks, least_accepted=0.2)
    for result in ranks[2:]:
        target, drafter = result["fetched"]
        assert target > drafter == result["remote_bytes"][1], "one layer, fetched once and for all"
