"""Ranks of two workers each compute prompts, and a stock server of two workers, or of one, decodes."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.conftest import Checkpoints
from tests.e2e.test_disaggregated import (
    COMMON,
    GREEDY,
    LONG,
    Disaggregated,
    ask,
    choices,
    fetched,
    launched,
    metric,
)
from tests.e2e.test_tensor_parallel import NUM_EXPERTS, SHAPE
from tests.helpers.waiting import wait_until
from vllm_dwdp.distributed.launch import BIND_ENV
from vllm_dwdp.entrypoints.launch.server import serving

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="NIXL is not installed"),
    pytest.mark.feature("Disaggregated serving (NIXL): tensor parallelism inside a rank"),
]

TENSOR = ("--tensor-parallel-size", "2", "--max-num-seqs", "2")
PROMPTS = ("The capital of France is", "two workers " * 12, LONG)


@pytest.fixture(scope="module")
def model(checkpoints: Checkpoints) -> str:
    return checkpoints("qwen3_moe", NUM_EXPERTS, **SHAPE)


@pytest.fixture(scope="module", params=[(2, "bfloat16"), (1, "float32")], ids=["same", "fewer"])
def setting(request: pytest.FixtureRequest) -> tuple[int, str]:
    """Workers of the decode server, and the dtype.

    One worker rounds other sums than two, and in bfloat16 a random model is soon on another way.
    """
    found: tuple[int, str] = request.param
    return found


@pytest.fixture(scope="module")
def expected(
    model: str, setting: tuple[int, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Any]]:
    """Of one stock server of two workers, before the launch: its processes are enough for two cores."""
    log, bound = tmp_path_factory.mktemp("stock") / "log", {BIND_ENV: "0|1"}
    given = (*COMMON, *TENSOR, "--dtype", setting[1])
    with serving(log, model, *given, environment=bound) as stock:
        return {prompt: choices(ask(stock.url, **GREEDY, prompt=prompt)) for prompt in PROMPTS}


@pytest.fixture(scope="module")
def launch(
    model: str,
    setting: tuple[int, str],
    expected: dict[str, list[Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Disaggregated]:
    num_workers, dtype = setting
    given = (*TENSOR, "--dtype", dtype, "--decode-args", f"--tensor-parallel-size {num_workers}")
    with launched(model, tmp_path_factory.mktemp("tensor"), *given) as started:
        yield started


def test_answers_are_those_of_one_stock_server_of_two_workers(
    launch: Disaggregated, expected: dict[str, list[Any]]
) -> None:
    for prompt in PROMPTS:
        for _ in launch.ranks:
            before = fetched(launch)
            assert choices(ask(launch.url, **GREEDY, prompt=prompt)) == expected[prompt]
            wait_until(lambda: fetched(launch) > before)  # noqa: B023
    for rank in launch.ranks:
        wait_until(lambda: metric(rank, "vllm:dwdp_fetched_bytes_total") > 0)  # noqa: B023
    assert metric(launch.decode, "vllm:nixl_num_failed_transfers_total") == 0
