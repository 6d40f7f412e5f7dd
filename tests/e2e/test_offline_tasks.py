"""Offline `LLM`s over two ranks for other tasks than text: vectors, scores, classes, pictures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Checkpoints
from tests.e2e.feature_requests import REQUESTS
from tests.e2e.matrix import run_cases

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.every_version,
    pytest.mark.timeout(600),
]

SETTINGS: dict[str, Any] = {
    "enforce_eager": True,
    "max_num_seqs": 1,
    "max_model_len": 512,
    "max_num_batched_tokens": 512,
    "seed": 0,
}
EMBEDS = {"runner": "pooling", "convert": "embed"}
PICTURES = {"mm_processor_kwargs": {"max_image_size": 490}}

Answers = dict[str, Any]
Compared = Callable[..., Answers]


@pytest.fixture
def compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compared:
    """Compare what two ranks answer with what one stock `LLM` answers; it must be exactly the same."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")

    def compare(model: str, requests: list[str], **llm: Any) -> Answers:
        from vllm_dwdp import LLM

        case = {"name": "stock", "model": model, "llm": SETTINGS | llm, "requests": requests}
        case["run"] = "tests.e2e.feature_requests:run"
        (stock,) = run_cases(tmp_path, "stock", [case])["stock"]
        assert "error" not in stock, stock["error"]
        options = {"dwdp": {"mode": "prefetch"}}
        ranks = LLM(model, data_parallel_size=2, additional_config=options, **SETTINGS | llm)
        try:
            before = ranks.dwdp_status()
            answers = {name: REQUESTS[name](ranks) for name in requests}
            for status, then in zip(ranks.dwdp_status(), before, strict=True):
                fetched = sum(status["fetched_bytes"].values()) - sum(
                    then["fetched_bytes"].values()
                )
                assert fetched > status["remote_expert_bytes"] > 0, "a rank has answered nothing"
        finally:
            ranks.llm_engine.engine_core.shutdown()
        for name in requests:
            assert answers[name] == stock["answers"][name], name
        return answers

    return compare


@pytest.mark.feature("Offline `LLM` over several ranks: `embed`, `score`, `encode`")
def test_vectors_and_scores(compared: Compared, checkpoints: Checkpoints) -> None:
    model = checkpoints("qwen3_moe", 8)
    found = compared(model, ["embed", "score", "encode"], **EMBEDS)
    assert len({tuple(vector) for vector in found["embed"]}) == len(found["embed"]) > 3
    assert len({round(score, 3) for score in found["score"]}) > 3
    assert found["encode"] == [pytest.approx(vector) for vector in found["embed"]]


@pytest.mark.feature("Offline `LLM` over several ranks: `classify`")
def test_classes(compared: Compared, checkpoints: Checkpoints) -> None:
    found = compared(checkpoints("qwen3_moe_classifier", 8), ["classify"], runner="pooling")
    assert len({tuple(probabilities) for probabilities in found["classify"]}) > 3


@pytest.mark.parametrize(
    "cache",
    [
        pytest.param(
            "lru",
            marks=pytest.mark.feature("Offline `LLM` over several ranks: images"),
        ),
        pytest.param(
            "shm",
            marks=pytest.mark.feature(
                "Processed images in shared memory (`--mm-processor-cache-type shm`)"
            ),
        ),
    ],
)
def test_images(compared: Compared, checkpoints: Checkpoints, cache: str) -> None:
    """A front end of several ranks keeps what it has processed itself, whatever the type says."""
    found = compared(checkpoints("aria", 8), ["images"], mm_processor_cache_type=cache, **PICTURES)[
        "images"
    ]
    assert len({tuple(tokens) for tokens in found}) > 5
