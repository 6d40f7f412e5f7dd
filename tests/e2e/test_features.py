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
from tests.e2e.feature_requests import CITIES, LETTERS, NUM_LETTERS, SETTINGS, traces
from tests.e2e.matrix import run_cases
from tests.tables.said import Said

pytestmark = [pytest.mark.e2e, pytest.mark.every_version, pytest.mark.timeout(600)]

Answers = dict[str, list[dict[str, Any]]]
RUN = "tests.e2e.feature_requests:run"
ASKED = [
    *("choice", "schema", "logprobs", "prompt_logprobs", "several", "beams", "prefix", "chunks"),
    *("batch", "constraints", "extension", "profile"),
]
PLUGGED_IN = {
    "worker_extension_cls": "tests.e2e.plugged_in.ExpertRows",
    "logits_processors": ["tests.e2e.plugged_in:OnlyEven"],
}
NUM_EXPERTS, NUM_LAYERS = 8, 3


def answered(folder: Path, model: str, mode: str, **case: Any) -> Answers:
    """Return what stock vLLM and two ranks answer to one case."""
    return all_answered(folder, model, mode, {"only": case})["only"]


def all_answered(
    folder: Path,
    model: str,
    mode: str,
    cases: dict[str, dict[str, Any]],
    environment: dict[str, str] | None = None,
) -> dict[str, Answers]:
    """Return what stock vLLM and two ranks answer to each case, by its name."""
    both: dict[str, Answers] = {name: {} for name in cases}
    for who, place in (("stock", {}), ("ranks", {"num_ranks": 2, "dwdp": {"mode": mode}})):
        listed = [
            {"name": name, "model": model, "run": RUN} | cases[name] | place for name in cases
        ]
        for name, results in run_cases(folder, who, listed, environment).items():
            both[name][who] = results
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
        checkpoints("qwen3_moe", NUM_EXPERTS),
        "prefetch",
        requests=ASKED,
        llm={"profiler_config": config} | PLUGGED_IN,
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
    found = set(alike(answers, "choice"))
    assert found <= set(CITIES) and len(found) > 1


@pytest.mark.feature("Structured outputs: JSON schema")
def test_a_json_schema(answers: Answers) -> None:
    found = json.loads(alike(answers, "schema"))
    assert len(found) == NUM_LETTERS and set(found) <= set(LETTERS)


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


@pytest.mark.feature(
    "Constraints on tokens: `allowed_token_ids`, `logit_bias`, `min_tokens`, penalties"
)
def test_constraints(answers: Answers) -> None:
    found = alike(answers, "constraints")
    plain = found["plain"]
    assert set(found["allowed"]) <= {7, 11, 13}
    assert found["biased"][0] == 17 and found["penalised"] != plain
    assert found["stopped"] == plain[: plain.index(plain[2]) + 1]
    assert len(found["later"]) >= 5


@pytest.mark.feature("Logits processors of one's own (`--logits-processors`)")
def test_a_logits_processor(answers: Answers) -> None:
    found = alike(answers, "constraints")
    assert any(token % 2 for token in found["plain"])
    assert not any(token % 2 for token in found["processed"])


@pytest.mark.feature("Methods added to workers (`--worker-extension-cls`)")
def test_an_extension_of_the_worker(answers: Answers) -> None:
    """It sees a whole model: every parameter has all experts."""
    found = alike(answers, "extension")
    assert len(found) == 2 * NUM_LAYERS and set(found.values()) == {NUM_EXPERTS}


@pytest.mark.feature("Profiling (`start_profile`, torch)")
def test_profiling(answers: Answers, profiles: Path) -> None:
    assert alike(answers, "profile")
    assert len(traces(profiles)) >= 3, "stock and each rank write one at least"


SETTINGS_OF_ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "as ever": ("", {}),
    "float32": ("Other dtypes (`--dtype float32`, `float16`)", {"dtype": "float32"}),
    "float16": ("Other dtypes (`--dtype float32`, `float16`)", {"dtype": "float16"}),
    "overrides": (
        "A model changed by `--hf-overrides`",
        {"hf_overrides": {"num_experts_per_tok": 3}},
    ),
    "eager": (
        "Other ways to read safetensors (`--safetensors-load-strategy`, several threads)",
        {"safetensors_load_strategy": "eager"},
    ),
    "threads": (
        "Other ways to read safetensors (`--safetensors-load-strategy`, several threads)",
        {"model_loader_extra_config": {"enable_multithread_load": True, "num_threads": 2}},
    ),
    "priority": (
        "Priorities (`--scheduling-policy priority`)",
        {"scheduling_policy": "priority", "max_num_seqs": 1},
    ),
    "embeds": ("Prompts as embeddings (`--enable-prompt-embeds`)", {"enable_prompt_embeds": True}),
}
"""Rows and arguments of `LLM`, by the name of a case."""
ASKED_OF = {"priority": ["priorities"], "embeds": ["embeds", "batch"]}


@pytest.fixture(scope="module")
def settings(
    checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Answers]:
    """Answers of engines that are set otherwise, one after the other in one process each."""
    cases = {
        name: {"llm": llm, "requests": ASKED_OF.get(name, ["batch"])}
        for name, (_, llm) in SETTINGS_OF_ENGINES.items()
    }
    folder = tmp_path_factory.mktemp("settings")
    return all_answered(folder, checkpoints("qwen3_moe", NUM_EXPERTS), "prefetch", cases)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.feature(row)] if row else [])
        for name, (row, _) in SETTINGS_OF_ENGINES.items()
    ],
)
def test_a_setting_of_the_engine(settings: dict[str, Answers], name: str) -> None:
    for request in ASKED_OF.get(name, ["batch"]):
        alike(settings[name], request)
    for rank in settings[name]["ranks"]:
        status = rank["status"]
        assert sum(status["fetched_bytes"].values()) > 5 * status["remote_expert_bytes"] > 0


def test_the_settings_are_in_force(settings: dict[str, Answers]) -> None:
    """What they change is seen: bytes of experts, tokens, or the order of requests."""

    def remote_bytes(name: str) -> int:
        return int(settings[name]["ranks"][0]["status"]["remote_expert_bytes"])

    def batch(name: str) -> Any:
        return alike(settings[name], "batch")

    assert remote_bytes("float32") == 2 * remote_bytes("float16") == 2 * remote_bytes("as ever")
    assert batch("overrides") != batch("as ever") == batch("eager") == batch("threads")
    ended = [name for name, _ in alike(settings["priority"], "priorities")]
    assert ended == ["d", "b", "c", "a"]
    plain, embedded = alike(settings["embeds"], "embeds")
    assert plain == embedded and len(set(plain)) > 2


@pytest.mark.feature("Dummy weights (`--load-format dummy`)")
def test_dummy_weights(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Their experts are so small that tokens alone would not tell wrong ones."""
    case = {
        "model": checkpoints("qwen3_moe", NUM_EXPERTS),
        "engine_args": {"load_format": "dummy"},
    }
    ((expected,),) = run_cases(tmp_path, "stock", [case | {"name": "stock"}]).values()
    ranks = {"name": "ranks", "num_ranks": 2, "dwdp": {"mode": "direct"}}
    (found,) = run_cases(tmp_path, "ranks", [case | ranks]).values()
    assert len(found) == 2
    for rank in found:
        assert rank["tokens"] == expected["tokens"]
        assert rank["weights"] == expected["weights"]
        assert rank["status"]["remote_expert_bytes"] > 0


@pytest.mark.feature(
    "Routed experts in the output (`--enable-return-routed-experts`)",
    stock_fails="AuxOutput Connector requires Model Runner V2; set VLLM_USE_V2_MODEL_RUNNER=1.",
)
def test_routed_experts(checkpoints: Checkpoints, tmp_path: Path, said: Said) -> None:
    """The CPU worker of vLLM has the other model runner only."""
    model = checkpoints("qwen3_moe", NUM_EXPERTS)
    llm = {"enable_return_routed_experts": True}
    both = answered(tmp_path, model, "prefetch", requests=["batch"], llm=llm)
    for result in both["stock"] + both["ranks"]:
        said(result["error"])


@pytest.mark.feature("KV cache in FP8 (`--kv-cache-dtype fp8`)")
def test_kv_cache_in_fp8(checkpoints: Checkpoints, tmp_path: Path) -> None:
    if not (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()):
        pytest.skip("FP8 KV cache on CPU requires x86 with AVX-512 or AMX.")
    model = checkpoints("qwen3_moe", NUM_EXPERTS)
    eight_bit = answered(
        tmp_path, model, "direct", requests=["batch", "logprobs"], llm={"kv_cache_dtype": "fp8"}
    )
    alike(eight_bit, "batch")
    alike(eight_bit, "logprobs")


@pytest.mark.feature("Last layers without the prompt (`--kv-sharing-fast-prefill`), of Gemma-4")
def test_fast_prefill(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """The layers that share keys compute fewer tokens than those before them."""
    model = checkpoints("gemma4_shared_kv", NUM_EXPERTS)
    both = answered(
        tmp_path,
        model,
        "prefetch",
        requests=["batch", "chunks"],
        llm={"kv_sharing_fast_prefill": True},
    )
    alike(both, "batch")
    alike(both, "chunks")
    for rank in both["ranks"]:
        assert sum(rank["status"]["fetched_bytes"].values()) > 0


@pytest.mark.feature(
    "KV cache offloaded to the host (`--kv-offloading-size`)",
    stock_fails="CPU Offloading is currently only supported on CUDA-alike and XPU GPUs",
)
def test_an_offloaded_kv_cache(checkpoints: Checkpoints, tmp_path: Path, said: Said) -> None:
    """On this processor it is in the host's memory anyway."""
    model = checkpoints("qwen3_moe", NUM_EXPERTS)
    both = answered(
        tmp_path, model, "prefetch", requests=["batch"], llm={"kv_offloading_size": 0.1}
    )
    for result in both["stock"] + both["ranks"]:
        said(result["error"])
