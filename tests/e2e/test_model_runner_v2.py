"""vLLM's second model runner, its default where there is Triton: on GPUs, and in the interpreter here.

What it alone can is asked for too: the experts to which tokens were routed.
"""

from pathlib import Path

import pytest

from tests.e2e.conftest import Checkpoints
from tests.e2e.test_features import NUM_EXPERTS, Answers, alike, all_answered
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
def answers(
    request: pytest.FixtureRequest,
    checkpoints: Checkpoints,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Answers]:
    """By mode, of a pair of ranks and of one stock engine."""
    cache = Path(request.config.cache.mkdir("packages"))
    try:
        environment = triton_interpreter.variables(cache / "triton", {})
    except Unavailable as reason:
        pytest.skip(str(reason))
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
