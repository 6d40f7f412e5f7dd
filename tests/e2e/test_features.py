"""What people turn on: each answer of two ranks is that of stock vLLM, whatever is asked of them.

One engine answers all requests of a kind, in the order in which they are listed; see
`feature_requests.py`. What stock vLLM cannot do on this processor is a row with its error.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.conftest import Checkpoints
from tests.e2e.feature_requests import CITIES, SETTINGS, traces
from tests.e2e.matrix import run_cases
from tests.tables.said import Said

pytestmark = [pytest.mark.e2e, pytest.mark.every_version, pytest.mark.timeout(600)]

Answers = dict[str, list[dict[str, Any]]]
RUN = "tests.e2e.feature_requests:run"
ASKED = [
    *("choice", "schema", "logprobs", "prompt_logprobs", "several", "beams", "prefix", "chunks"),
    *("batch", "profile"),
]


def answered(folder: Path, model: str, mode: str, **case: Any) -> Answers:
    """Return what stock vLLM and two ranks answer to one case."""
    both: Answers = {}
    for name, place in (("stock", {}), ("ranks", {"num_ranks": 2, "dwdp": {"mode": mode}})):
        made = {"name": name, "model": model, "run": RUN} | case | place
        both |= run_cases(folder, name, [made])
    return both


@pytest.fixture(scope="module")
def profiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where engines write profiles."""
    return tmp_path_factory.mktemp("profiles")


@pytest.fixture(scope="module")
def answers(
    checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory, profiles: Path
) -> Answers:
    """Of one pair of ranks in prefetch mode, and of one stock engine."""
    config = {"profiler": "torch", "torch_profiler_dir": str(profiles)}
    return answered(
        tmp_path_factory.mktemp("features"),
        checkpoints("qwen3_moe", 8),
        "prefetch",
        requests=ASKED,
        llm={"profiler_config": config},
    )


def alike(answers: Answers, request: str) -> Any:
    """Return the answer, which is the same everywhere."""
    (stock,) = answers["stock"]
    assert "error" not in stock, stock["error"]
    ranks = [rank.get("answers", rank) for rank in answers["ranks"]]
    assert len(ranks) == 2
    assert [rank.get(request) for rank in ranks] == [stock["answers"][request]] * 2
    return stock["answers"][request]


def test_ranks_have_answered_as_ranks(answers: Answers) -> None:
    for rank in answers["ranks"]:
        status = rank["status"]
        assert status["mode"] == "prefetch"
        fetched = sum(status["fetched_bytes"].values())
        assert fetched > 20 * status["remote_expert_bytes"] > 0


@pytest.mark.feature("Structured outputs: choice")
def test_a_choice(answers: Answers) -> None:
    assert alike(answers, "choice") in CITIES


@pytest.mark.feature("Structured outputs: JSON schema")
def test_a_json_schema(answers: Answers) -> None:
    found = json.loads(alike(answers, "schema"))
    assert len(found) == 2 and set(found) <= {"a", "b"}


@pytest.mark.feature("Logprobs")
def test_logprobs(answers: Answers) -> None:
    found = alike(answers, "logprobs")
    assert len(found) == 8 and all(len(place) >= 3 for place in found)
    assert all(logprob < 0 for place in found for _, logprob, _ in place)


@pytest.mark.feature("Prompt logprobs")
def test_prompt_logprobs(answers: Answers) -> None:
    found = alike(answers, "prompt_logprobs")
    assert found[0] is None and len(found) > 5 and all(found[1:])


@pytest.mark.feature("Several samples of a prompt (`n` above 1), seeded")
def test_several_samples(answers: Answers) -> None:
    found = alike(answers, "several")
    assert len({tuple(tokens) for tokens in found}) == 3


@pytest.mark.feature("Beam search")
def test_beam_search(answers: Answers) -> None:
    beams = alike(answers, "beams")
    assert len(beams) == 3
    assert [score for _, score in beams] == sorted((score for _, score in beams), reverse=True)


@pytest.mark.feature("Prefix caching")
def test_prefix_caching(answers: Answers) -> None:
    (first, tokens), (second, again) = alike(answers, "prefix")
    assert first == 0 and second >= 64
    assert tokens == again


@pytest.mark.feature("Chunked prefill")
def test_chunked_prefill(answers: Answers) -> None:
    found = alike(answers, "chunks")
    assert max(length for length, _ in found) > 2 * SETTINGS["max_num_batched_tokens"]


@pytest.mark.feature("Batches of several requests")
def test_batches(answers: Answers) -> None:
    found = alike(answers, "batch")
    assert len({tuple(tokens) for tokens in found}) == 3


@pytest.mark.feature("Profiling (`start_profile`, torch)")
def test_profiling(answers: Answers, profiles: Path) -> None:
    assert alike(answers, "profile")
    assert len(traces(profiles)) >= 3, "stock and each rank write one at least"


@pytest.mark.feature("Dummy weights (`--load-format dummy`)")
def test_dummy_weights(checkpoints: Checkpoints, tmp_path: Path) -> None:
    model = checkpoints("qwen3_moe", 8)
    llm = {"load_format": "dummy"}
    both = answered(tmp_path, model, "direct", requests=["batch"], llm=llm)
    alike(both, "batch")


@pytest.mark.feature(
    "Routed experts in the output (`--enable-return-routed-experts`)",
    stock_fails="AuxOutput Connector requires Model Runner V2; set VLLM_USE_V2_MODEL_RUNNER=1.",
)
def test_routed_experts(checkpoints: Checkpoints, tmp_path: Path, said: Said) -> None:
    """The CPU worker of vLLM has the other model runner only."""
    model = checkpoints("qwen3_moe", 8)
    llm = {"enable_return_routed_experts": True}
    both = answered(tmp_path, model, "prefetch", requests=["batch"], llm=llm)
    for result in both["stock"] + both["ranks"]:
        said(result["error"])


@pytest.mark.feature("KV cache in FP8 (`--kv-cache-dtype fp8`)")
def test_kv_cache_in_fp8(checkpoints: Checkpoints, tmp_path: Path) -> None:
    if not (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()):
        pytest.skip("FP8 KV cache on CPU requires x86 with AVX-512 or AMX.")
    model = checkpoints("qwen3_moe", 8)
    eight_bit = answered(
        tmp_path, model, "direct", requests=["batch", "logprobs"], llm={"kv_cache_dtype": "fp8"}
    )
    alike(eight_bit, "batch")
    alike(eight_bit, "logprobs")
