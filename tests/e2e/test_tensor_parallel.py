"""Tensor parallelism inside of a rank: two ranks of two workers each, against stock vLLM of two."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.conftest import Checkpoints, StockEngine
from tests.e2e.engine_process import PROMPTS
from tests.e2e.launch_kills import Launch, RankClient, server_at
from tests.e2e.matrix import run_cases
from tests.e2e.test_survival import PROMPTS as LOAD
from tests.helpers.engines import ROOT
from tests.helpers.waiting import wait_until
from vllm_dwdp.entrypoints.cli.status import find_ranks
from vllm_dwdp.entrypoints.launch.server import Server

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(600),
    pytest.mark.feature("Tensor parallelism inside a rank"),
]

SHAPE = {"num_attention_heads": 4, "num_key_value_heads": 2, "moe_intermediate_size": 128}
TENSOR = {"engine_args": {"tensor_parallel_size": 2}}
NUM_EXPERTS = 7
SLICE_BYTES = 3 * 3 * 160 * 128 * 2 // 2
"""Of one expert on one worker: three layers of three matrices in bf16, cut in two."""
SERVED = (
    *("--enforce-eager", "--tensor-parallel-size", "2", "--max-num-seqs", "1"),
    *("--max-num-batched-tokens", "64"),
)


@pytest.fixture
def model(checkpoints: Checkpoints) -> str:
    """Seven experts, of which two ranks hold four and three."""
    return checkpoints("qwen3_moe", NUM_EXPERTS, **SHAPE)


@pytest.fixture
def expected(stock: StockEngine, model: str) -> list[list[int]]:
    tokens: list[list[int]] = stock(model, **TENSOR)["tokens"]
    return tokens


def check_workers(workers: list[dict[str, Any]], mode: str) -> None:
    """Both workers of each rank hold their slice of its experts, and read the others' slices."""
    places = [(each["rank"], each["tensor_rank"], each["group"]) for each in workers]
    assert sorted(places) == [(0, 0, 0), (0, 1, 1), (1, 0, 0), (1, 1, 1)]
    for each in workers:
        num_resident = (4, 3)[each["rank"]]
        assert each["resident_expert_bytes"] == num_resident * SLICE_BYTES
        assert each["remote_expert_bytes"] == (NUM_EXPERTS - num_resident) * SLICE_BYTES
        assert each["steps"][mode] > 0 and set(each["steps"]) == {mode}
        fetched = each["fetched_bytes"].get(str(1 - each["rank"]), 0)
        assert (fetched > each["remote_expert_bytes"]) == (mode == "prefetch"), each


def test_tokens_of_two_ranks_of_two_workers(
    expected: list[list[int]], model: str, tmp_path: Path
) -> None:
    common = TENSOR | {"model": model, "num_ranks": 2}
    common["report"] = "tests.e2e.engine_process:mapped_segments"
    cases: list[dict[str, Any]] = [
        common | {"name": mode, "dwdp": {"mode": mode}} for mode in ("direct", "prefetch")
    ]
    for mode, ranks in run_cases(tmp_path, "tensor", cases).items():
        assert [result["tokens"] for result in ranks] == [expected, expected], mode
        workers = [worker for result in ranks for worker in result["workers"]]
        check_workers([worker["status"] for worker in workers], mode)
        for worker in workers:
            status = worker["status"]
            assert status["read_share"] == pytest.approx((4, 3)[status["rank"]] / NUM_EXPERTS)
            assert worker["segments"], "through which its workers exchange tensors"
            assert all(name.endswith(" (deleted)") for name in worker["segments"]), "left by a kill"
        slices = [worker["weights"] for worker in workers]
        assert slices[0] == slices[2] != slices[1] == slices[3], "as the kernels see them"


@pytest.mark.slow
def test_workers_of_all_tensor_ranks_serve_the_new_weights(
    expected: list[list[int]],
    model: str,
    stock: StockEngine,
    checkpoints: Checkpoints,
    tmp_path: Path,
) -> None:
    """Each tensor rank's workers agree among themselves; all of a rank's have the new weights."""
    new = checkpoints("qwen3_moe", NUM_EXPERTS, seed=1, **SHAPE)
    renewed = stock(new, **TENSOR)["tokens"]
    assert renewed != expected
    case: dict[str, Any] = TENSOR | {"name": "renewed", "model": model, "num_ranks": 2}
    case["dwdp"] = {"mode": "prefetch"}
    case["updates"] = [
        {"calls": [["reload_weights", {"weights_path": path}]]} for path in (new, model)
    ]
    for rank in run_cases(tmp_path, "renewed", [case])["renewed"]:
        assert rank["tokens"] == expected
        for number, tokens in enumerate((renewed, expected)):
            said = rank["updates"][number]
            assert (said["error"], said["refused"], said["resume"]) == ("", "", "")
            assert said["tokens"] == tokens, number
        for worker in rank["workers"]:
            status = worker["status"]
            assert (status["weight_update"], status["state"]) == (2, "serving")
            assert sum(status["fetched_bytes"].values()) > status["remote_expert_bytes"]


@pytest.mark.slow
def test_one_server_of_two_ranks_of_two_workers(
    expected: list[list[int]], model: str, tmp_path: Path
) -> None:
    """`vllm serve -dp 2 -tp 2`: one engine in metrics for both workers; a worker's death ends it all."""
    options = ("--distributed-executor-backend", "dwdp", "--data-parallel-size", "2")
    config = ("--additional-config", json.dumps({"dwdp": {"mode": "prefetch"}}))
    named = ("--served-model-name", "m", "--max-model-len", "512")
    with Server([model, *named, *SERVED, *options, *config], tmp_path / "log", {}) as server:
        server.wait_until_ready()
        for rank in (0, 1):
            for prompt, tokens in zip(PROMPTS, expected, strict=True):
                assert server.tokens(prompt, rank=rank, max_tokens=12) == tokens, rank
        total = 2 * SLICE_BYTES * NUM_EXPERTS
        wait_until(lambda: server.metric("vllm:dwdp_fetched_bytes_total", engine="1"))
        for rank, num_resident in enumerate((4, 3)):
            resident = num_resident * 2 * SLICE_BYTES
            labels = {"engine": str(rank)}
            assert server.metric("vllm:dwdp_resident_expert_bytes", **labels) == resident
            assert server.metric("vllm:dwdp_remote_expert_bytes", **labels) == total - resident
            assert server.metric("vllm:dwdp_config_info", group="0", **labels) == 1
        family = server.processes()
        workers = server.processes("VLLM::Worker")
        assert len(workers) == 4
        workers[3].kill()
        server.process.wait(timeout=90)
        alive = psutil.wait_procs(family, timeout=30)[1]
        assert not alive, alive


OFFLINE = """
import json, sys
from vllm import SamplingParams
from vllm_dwdp import LLM

prompts, model = json.loads(sys.argv[1])
llm = LLM(
    model, data_parallel_size=2, tensor_parallel_size=2, enforce_eager=True, max_num_seqs=1,
    max_model_len=512, max_num_batched_tokens=64, additional_config={"dwdp": {"mode": "direct"}},
)
params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
outputs = llm.generate(prompts * 3, params, use_tqdm=False)
found = {"tokens": [list(out.outputs[0].token_ids) for out in outputs], "status": llm.dwdp_status()}
print("FOUND", json.dumps(found))
"""


@pytest.mark.slow
def test_offline(expected: list[list[int]], model: str, tmp_path: Path) -> None:
    script = tmp_path / "offline.py"
    script.write_text(
        "if __name__ == '__main__':\n    " + OFFLINE.strip().replace("\n", "\n    ") + "\n"
    )
    command = [sys.executable, str(script), json.dumps([PROMPTS, model])]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
        cwd=ROOT,
        env=environment,
    )
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-4000:]
    (line,) = [line for line in ended.stdout.splitlines() if line.startswith("FOUND ")]
    found = json.loads(line.removeprefix("FOUND "))
    assert found["tokens"] == expected * 3
    check_workers(found["status"], "direct")


@pytest.fixture
def launched(model: str, tmp_path: Path) -> Iterator[Launch]:
    launch = Launch(model, tmp_path, 2, *SERVED)
    try:
        launch.wait_for("all 2 ranks serve at")
        yield launch
        launch.end()
    finally:
        if launch.process.poll() is None:
            launch.process.send_signal(signal.SIGKILL)
            launch.process.wait(timeout=30)


def workers_at(launch: Launch) -> dict[tuple[int, int], dict[str, Any]]:
    """Return what every worker says of itself, by rank and tensor rank."""
    found = find_ranks(launch.place, secret_file=None, group_size=2, num_groups=2)
    return {(each["rank"], each["tensor_rank"]): each for each in found if "rank" in each}


@pytest.mark.slow
def test_a_killed_worker_takes_its_rank_along_which_returns_with_both(
    expected: list[list[int]], launched: Launch
) -> None:
    """The other rank serves on; both workers of the one that returns adopt their slices."""
    ports = launched.rank_ports()
    for port in ports.values():
        server = server_at(port)
        found = [server.tokens(prompt, max_tokens=12) for prompt in PROMPTS]
        assert found == expected
    before = workers_at(launched)
    check_workers(list(before.values()), "direct")
    held = find_ranks(launched.place, secret_file=None, group_size=2, num_groups=2)
    assert [each["held_ranks"] for each in held if "held_ranks" in each] == [[0, 1], [0, 1]]
    answers = [server_at(ports[0]).tokens(prompt) for prompt in LOAD]
    clients = {rank: RankClient(port, answers) for rank, port in ports.items()}
    try:
        wait_until(lambda: all(client.num_answers > 3 for client in clients.values()), 60)
        clients[1].is_down = True
        psutil.Process(before[1, 1]["pid"]).kill()
        wait_until(lambda: launched.log.read_text().count("all 2 ranks serve at") == 2, 240)
        clients[1].is_down = False
        num_answers = {rank: client.num_answers for rank, client in clients.items()}
        wait_until(
            lambda: all(
                client.num_answers > num_answers[rank] + 3 for rank, client in clients.items()
            ),
            60,
        )
        after = workers_at(launched)
        check_workers(list(after.values()), "direct")
        for place, worker in after.items():
            assert worker["adopted"] == (place[0] == 1), place
            assert (worker["pid"] == before[place]["pid"]) == (place[0] == 0), place
            assert set(worker["peers"].values()) == {"ready"}, place
            assert worker["read_expert_bytes"] == 0 or place[0] == 0, place
    finally:
        for client in clients.values():
            client.ended.set()
        for client in clients.values():
            client.join(timeout=60)
    for rank, client in clients.items():
        assert not client.failures and not client.num_different, (rank, client.failures)


@pytest.mark.feature("reload_weights")
def test_a_rank_of_which_one_worker_has_other_weights_serves_none(
    checkpoints: Checkpoints, model: str, tmp_path: Path
) -> None:
    """Once no worker can read, once one cannot read, once one cannot write: no rank mixes slices."""
    new = checkpoints("qwen3_moe", NUM_EXPERTS, seed=1, **SHAPE)
    for name in ("unread", "unwritten"):
        (tmp_path / name).symlink_to(new)
    paths = ["/nowhere", str(tmp_path / "unread"), str(tmp_path / "unwritten"), new]
    updates = [{"calls": [["reload_weights", {"weights_path": path}]]} for path in paths]
    case = TENSOR | {"name": "partly", "model": model, "num_ranks": 2, "updates": updates}
    case |= {"dwdp": {"mode": "prefetch"}, "prepare": "tests.helpers.failing_worker:fail"}
    ranks = run_cases(tmp_path, "partly", [case])["partly"]
    for rank in ranks:
        nowhere, unread, unwritten, whole = rank["updates"]
        assert "there is no /nowhere" in nowhere["error"] or "cannot take" in nowhere["error"]
        assert nowhere["tokens"] == rank["tokens"], "all have their old slices"
        for partly in (unread, unwritten):
            assert "refuses to serve" in partly["error"], partly
            assert "goes on with" not in partly["error"], partly
            assert "refuses to serve" in partly["refused"] and not partly["tokens"], partly
        assert (whole["error"], whole["refused"]) == ("", "")
        assert whole["tokens"] == ranks[0]["updates"][-1]["tokens"] != rank["tokens"]
        statuses = [worker["status"] for worker in rank["workers"]]
        assert {status["state"] for status in statuses} == {"serving"}
        assert {status["weights"]["checkpoint"] for status in statuses} == {new}
