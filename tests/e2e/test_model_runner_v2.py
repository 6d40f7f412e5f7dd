"""vLLM's second model runner, its default where there is Triton: on GPUs, and in the interpreter here.

What it alone can is asked for too: the experts to which tokens were routed.
"""

from pathlib import Path

import pytest

from tests.e2e import drafters
from tests.e2e.conftest import Checkpoints, StockEngine
from tests.e2e.test_features import NUM_EXPERTS, Answers, alike, all_answered
from tests.e2e.test_speculation import MTP, check_counted, run_both, spec
from tests.helpers import triton_interpreter
from tests.helpers.environments import Unavailable

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.every_version,
    pytest.mark.timeout(1200),
]

ASKED = [
    *("choice", "schema", "logprobs", "prompt_logprobs", "several", "prefix", "chunks", "batch"),
    "routed_experts",
]
MODES = ("direct", "prefetch")
TOP_K = 2


@pytest.fixture(scope="module")
def environment(request: pytest.FixtureRequest) -> dict[str, str]:
    """Of engines that have Triton's interpreter."""
    try:
        cache = Path(request.config.cache.mkdir("packages"))
        return triton_interpreter.variables(cache / "triton", {})
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def answers(
    environment: dict[str, str],
    checkpoints: Checkpoints,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Answers]:
    """By mode, of a pair of ranks and of one stock engine."""
    model = checkpoints("qwen3_moe", NUM_EXPERTS)
    case = {"requests": ASKED, "llm": {"enable_return_routed_experts": True}}
    folders = {mode: tmp_path_factory.mktemp(mode) for mode in MODES}
    return {
        mode: all_answered(folder, model, mode, {"only": case}, environment)["only"]
        for mode, folder in folders.items()
    }


@pytest.mark.feature("Model runner V2, in Triton's interpreter")
@pytest.mark.parametrize("mode", MODES)
def test_answers_are_those_of_stock(answers: dict[str, Answers], mode: str) -> None:
    for request in ASKED:
        assert alike(answers[mode], request), request
    for rank in answers[mode]["ranks"]:
        assert rank["status"]["mode"] == mode
        assert rank["status"]["remote_expert_bytes"] > 0


@pytest.mark.feature(
    "Routed experts in the output (`--enable-return-routed-experts`), in Triton's interpreter"
)
@pytest.mark.parametrize("mode", MODES)
def test_routed_experts(answers: dict[str, Answers], mode: str) -> None:
    """With the first model runner stock vLLM refuses: see `test_features`."""
    found = alike(answers[mode], "routed_experts")
    assert len(found) > 1
    chosen = [layer for token in found for layer in token]
    assert {len(layer) for layer in chosen} == {TOP_K}
    assert {expert for layer in chosen for expert in layer} == set(range(NUM_EXPERTS))


@pytest.mark.feature("Speculative decoding: MTP, with model runner V2, in Triton's interpreter")
def test_mtp(
    stock: StockEngine, checkpoints: Checkpoints, environment: dict[str, str], tmp_path: Path
) -> None:
    """Drafts are accepted: a wrong expert of the drafter would show in their number."""
    source = checkpoints("glm4_moe", NUM_EXPERTS, first_k_dense_replace=0)
    model = drafters.make_target(tmp_path / "target", source)
    expected, ranks = run_both(stock, tmp_path, model, *MODES, environment=environment, **spec(MTP))
    check_counted(expected, ranks, least_accepted=0.5)
    for result in ranks[2:]:
        target, drafter = result["fetched"]
        assert target > 10 * drafter
        assert drafter == result["remote_bytes"][1], "one layer, fetched once and for all"
