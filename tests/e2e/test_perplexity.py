"""A model that knows English gives a text the same probability, to the last digit, in every mode.

Exactness with random experts is tested in `test_identical.py`. Here a wrong expert would also show as
what it is: a worse model.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import StockEngine
from tests.e2e.matrix import run_cases
from tests.helpers.engines import ROOT

pytestmark = [pytest.mark.e2e, pytest.mark.every_version]

TEXT = """\
A library near the harbour keeps one copy of every sea chart. For years each of its four reading
rooms had a full set of its own, and the shelves left little space for the people who came to read.
Then the librarian had an idea. She divided the charts among the rooms, and cut a window into every
wall, so that a reader could look at a chart on the other side without getting up from the chair.
Nobody had to wait for the other rooms to open, and nobody had to carry anything. When one room was
closed for repairs, its charts stayed where they were, and the others went on reading them through
the glass. In the evening the children of the fishermen came to do their homework, because now there
was finally enough room for a long table.
"""
MODES = ("direct", "prefetch")


@pytest.fixture(scope="module")
def speaking_model() -> str:
    """Return the folder of the model, made in the user's cache when first needed."""
    command = [sys.executable, str(ROOT / "examples/speaking_model.py"), "--experts", "4"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    if ended.returncode == 1 and "error: " in ended.stderr:
        pytest.skip(ended.stderr.partition("error: ")[2].strip())
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def perplexity(logprobs: list[float]) -> float:
    return math.exp(-math.fsum(logprobs) / len(logprobs))


@pytest.mark.timeout(600)
@pytest.mark.feature("Prompt logprobs")
def test_perplexity_is_that_of_stock_vllm_in_every_mode(
    stock: StockEngine, speaking_model: str, tmp_path: Path
) -> None:
    settings = {"text": TEXT, "engine_args": {"max_num_batched_tokens": 256}}
    expected = stock(speaking_model, **settings)["logprobs"]
    cases = [
        {"name": mode, "model": speaking_model, "num_ranks": 2, "dwdp": {"mode": mode}} | settings
        for mode in MODES
    ]
    results = run_cases(tmp_path, "dwdp", cases)
    for mode in MODES:
        for result in results[mode]:
            where = f"{mode}, rank {result['rank']}"
            status = result["status"]
            assert status["mode"] == mode
            assert status["remote_expert_bytes"] > 0.4 * 0.63e9, f"{where}: DWDP did not run"
            assert result["logprobs"] == expected, where
            assert perplexity(result["logprobs"]) == perplexity(expected), where
        fetched = [sum(rank["status"]["fetched_bytes"].values()) for rank in results[mode]]
        assert all(fetched) == (mode == "prefetch")


@pytest.mark.timeout(600)
def test_the_model_knows_english(stock: StockEngine, speaking_model: str) -> None:
    """Against random weights of the same shape, and against words in the wrong order."""
    text = {"text": TEXT, "engine_args": {"max_num_batched_tokens": 256}}
    known = perplexity(stock(speaking_model, **text)["logprobs"])
    random = {"load_format": "dummy", "hf_overrides": {"num_hidden_layers": 2}}
    unknown = stock(speaking_model, **text | {"engine_args": text["engine_args"] | random})
    assert known < 60
    assert perplexity(unknown["logprobs"]) > 100 * known
