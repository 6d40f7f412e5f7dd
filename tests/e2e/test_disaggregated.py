"""Two ranks compute prompts, a stock server decodes: answers as of one stock server, and bytes counted.

One launch for all tests of this file, beside one stock server; the tests that kill come last.
"""

import http.client
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from numpy import float32
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.conftest import Checkpoints
from tests.helpers.waiting import wait_until
from vllm_dwdp.entrypoints.launch.ports import free_ports
from vllm_dwdp.entrypoints.launch.server import Server, serving

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="NIXL is not installed"),
]

CHUNK = 256
COMMON = ("--enforce-eager", "--max-num-batched-tokens", str(CHUNK), "--block-size", "32")
GREEDY = {"model": "m", "temperature": 0, "max_tokens": 12, "ignore_eos": True}
LONG = "".join(chr(33 + 7 * i % 90) for i in range(3 * CHUNK))
LEASE_S = 6
TO_BE_FETCHED = {"do_remote_decode": True, "do_remote_prefill": False}
"""Asks a rank to keep the KV blocks of a prompt."""


class Disaggregated:
    """The launch, and what is asked of it.

    Args:
        model: folder of the checkpoint.
        folder: for its logs and meeting place.
        arguments: further ones of launch.
    """

    def __init__(self, model: str, folder: Path, *arguments: str) -> None:
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        self.meeting = f"unix://{folder}/meet"
        self.log = folder / "launch.log"
        lease = {"kv_connector_extra_config": {"kv_lease_duration": LEASE_S}}
        dwdp = {"dwdp": {"mode": "prefetch", "rendezvous": self.meeting}}
        command = [sys.executable, "-m", "vllm_dwdp.entrypoints.cli.main", "launch", model]
        command += ["--decode-servers", "1", "--decode-args", "--max-num-seqs 16"]
        command += ["--port", str(port), "--logs", str(folder / "logs")]
        command += ["--served-model-name", "m", "--max-model-len", "2048", *COMMON]
        command += ["--additional-config", json.dumps(dwdp)]
        command += ["--kv-transfer-config", json.dumps(lease), "--shutdown-timeout", "60"]
        command += arguments
        settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "COLUMNS": "300"}
        (folder / "meet").mkdir(mode=0o700)
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | settings
            )

    def line(self, pattern: str, number: int = 0) -> re.Match[str]:
        """Wait for a line of launch, the `number`-th of its kind."""

        def find() -> list[re.Match[str]]:
            assert self.process.poll() is None, self.log.read_text()
            return [*re.finditer(pattern, self.log.read_text(), re.M)][number:]

        wait_until(find, timeout_s=400)
        return find()[0]

    def wait_until_ready(self) -> None:
        self.line("^all 2 ranks serve at")
        self.ranks = [self.place(f"rank {rank}", "prefill")[1] for rank in range(2)]
        self.decode = self.place("decode 0", "decode")[1]

    def place(self, name: str, role: str, number: int = 0) -> tuple[int, str]:
        """Process id and URL of a server, as launch prints them."""
        pattern = rf"^{name}: serving, pid (\d+).*, {role} at (\S+)$"
        pid, url = self.line(pattern, number).groups()
        return int(pid), url


@contextmanager
def launched(model: str, folder: Path, *arguments: str) -> Iterator[Disaggregated]:
    """Hand out a launch that serves, as `Disaggregated`; afterwards none of its processes is left."""
    started = Disaggregated(model, folder, *arguments)
    family: list[psutil.Process] = []
    try:
        started.wait_until_ready()
        family = psutil.Process(started.process.pid).children(recursive=True)
        yield started
    finally:
        started.process.send_signal(signal.SIGTERM)
        started.process.wait(timeout=200)
    assert not psutil.wait_procs(family, timeout=20)[1], "left behind"


def ask(url: str, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    request = urllib.request.Request(
        url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=180) as response:
        answer: dict[str, Any] = json.loads(response.read())
    return answer


def metric(url: str, name: str) -> float:
    with urllib.request.urlopen(url + "/metrics", timeout=30) as response:
        families = [*text_string_to_metric_families(response.read().decode())]
    return sum(s.value for family in families for s in family.samples if s.name == name)


def fetched(launch: Disaggregated) -> float:
    return metric(launch.decode, "vllm:nixl_bytes_transferred_sum")


@pytest.fixture(scope="module")
def model(checkpoints: Checkpoints) -> str:
    return checkpoints("qwen3_moe", 8, num_hidden_layers=4)


@pytest.fixture(scope="module")
def launch(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disaggregated]:
    with launched(model, tmp_path_factory.mktemp("disaggregated")) as started:
        yield started


@pytest.fixture(scope="module")
def stock(
    model: str, launch: Disaggregated, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """After the launch: side by side they would start in twice the time."""
    with serving(tmp_path_factory.mktemp("stock") / "log", model, *COMMON) as server:
        yield server


def choices(answer: dict[str, Any]) -> list[Any]:
    kept = ("index", "text", "message", "finish_reason", "stop_reason")
    return [{key: choice.get(key) for key in kept} for choice in answer["choices"]]


def logprobs(answer: dict[str, Any]) -> list[tuple[str, Any, dict[str, Any]]]:
    """Return each token of the first choice, its log-probability, and those of the likeliest tokens.

    An engine computes float32; the router writes such a number anew, and changes the last bit of its
    float64 (`tests/compat/test_router.py`).
    """
    given = answer["choices"][0]["logprobs"]
    if "content" not in given:
        columns = given["tokens"], given["token_logprobs"], given["top_logprobs"]
        each = [*zip(*columns, strict=True)]
    else:
        each = [
            (one["token"], one["logprob"], {o["token"]: o["logprob"] for o in one["top_logprobs"]})
            for one in given["content"]
        ]
    return [
        (token, float32(value), {other: float32(top[other]) for other in top})
        for token, value, top in each
    ]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "The capital of France is", "logprobs": 3},
        {"prompt": "a"},
        {"prompt": [5, 6, 7] * 40, "logprobs": 0},
        {"prompt": LONG, "logprobs": 3},
        {"prompt": "prompt " * 9, "logprobs": 2},
        {"prompt": "two answers " * 9, "n": 2, "temperature": 0.01, "seed": 3},
        {"prompt": "cached " * 30, "logprobs": 3, "repeated": 3},
        {"prompt": ["first " * 12, "second " * 24]},
    ],
    ids=["plain", "short", "tokens", "long", "several", "n=2", "cached", "batch"],
)
def test_completions_are_those_of_stock(
    launch: Disaggregated, stock: Server, body: dict[str, Any]
) -> None:
    times = body.pop("repeated", 1)
    expected = ask(stock.url, **GREEDY | body)
    for _ in range(times):
        answer = ask(launch.url, **GREEDY | body)
        assert choices(answer) == choices(expected)
        if "logprobs" in body:
            assert logprobs(answer) == logprobs(expected)


def test_chat_is_that_of_stock(launch: Disaggregated, stock: Server) -> None:
    messages = [{"role": "user", "content": "Who reads whose experts? " * 8}]
    body = GREEDY | {"messages": messages, "logprobs": True, "top_logprobs": 2}
    path = "/v1/chat/completions"
    answer, expected = (ask(url, path, **body) for url in (launch.url, stock.url))
    assert choices(answer) == choices(expected)
    assert logprobs(answer) == logprobs(expected)


def test_log_probabilities_of_a_prompt_are_those_of_stock(
    launch: Disaggregated, stock: Server
) -> None:
    def asked(url: str) -> list[Any]:
        (choice,) = ask(url, **GREEDY, prompt="of prompts " * 12, prompt_logprobs=1)["choices"]
        first, *others = choice["prompt_logprobs"]
        assert first is None
        return [{each: float32(of[each]["logprob"]) for each in of} for of in others]

    expected = asked(stock.url)
    assert len(expected) > 100 and asked(launch.url) == expected


def test_stop_strings_are_those_of_stock(launch: Disaggregated, stock: Server) -> None:
    prompt = "stop somewhere " * 8
    text = ask(stock.url, **GREEDY, prompt=prompt)["choices"][0]["text"]
    stop = text[4:6]
    expected = choices(ask(stock.url, **GREEDY, prompt=prompt, stop=[stop]))
    assert expected[0]["finish_reason"] == "stop"
    assert choices(ask(launch.url, **GREEDY, prompt=prompt, stop=[stop])) == expected


def stream(url: str, path: str = "/v1/completions", **body: Any) -> http.client.HTTPResponse:
    request = urllib.request.Request(
        url + path,
        json.dumps(GREEDY | body | {"stream": True}).encode(),
        {"Content-Type": "application/json"},
    )
    opened: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=180)
    return opened


def pieces(url: str, path: str = "/v1/completions", **body: Any) -> tuple[str, str]:
    """Return the text of a stream, and its last line."""
    text, last = "", ""
    with stream(url, path, **body) as response:
        for line in response:
            if line.startswith(b"data: {"):
                choice = json.loads(line[6:])["choices"][0]
                text += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            if line.strip():
                last = line.decode().strip()
    return text, last


def test_streams_are_those_of_stock(launch: Disaggregated, stock: Server) -> None:
    body = {"prompt": "stream " * 20, "max_tokens": 40}
    expected = pieces(stock.url, **body)
    assert expected[1] == "data: [DONE]" and expected[0]
    assert pieces(launch.url, **body) == expected


def test_streams_of_a_chat_are_those_of_stock(launch: Disaggregated, stock: Server) -> None:
    body = {"messages": [{"role": "user", "content": "Go on, please. " * 8}]}
    expected, answer = (
        pieces(url, "/v1/chat/completions", **body) for url in (stock.url, launch.url)
    )
    assert expected[1] == "data: [DONE]" and expected[0]
    assert answer == expected


def test_a_client_that_goes_away_ends_its_request(launch: Disaggregated) -> None:
    before = metric(launch.decode, "vllm:generation_tokens_total")
    with stream(launch.url, prompt="somebody leaves " * 12, max_tokens=1700) as response:
        assert response.readline().startswith(b"data: {")
        assert metric(launch.decode, "vllm:num_requests_running") == 1
    wait_until(lambda: metric(launch.decode, "vllm:num_requests_running") == 0)
    assert metric(launch.decode, "vllm:generation_tokens_total") - before < 1000
    wait_until(lambda: used(launch.decode) == 0)


def test_bytes_moved_on_both_ways(launch: Disaggregated) -> None:
    """Experts to the ranks, KV blocks to the decode server; nothing failed."""
    for rank in launch.ranks:
        before = metric(rank, "vllm:dwdp_fetched_bytes_total"), fetched(launch)
        for number in range(4):
            ask(launch.url, **GREEDY, prompt=f"{number} of {rank} " * 12)
        wait_until(lambda: metric(rank, "vllm:dwdp_fetched_bytes_total") > before[0])  # noqa: B023
        wait_until(lambda: fetched(launch) > before[1])  # noqa: B023
    assert metric(launch.decode, "vllm:nixl_num_failed_transfers_total") == 0


def test_every_server_is_in_status(launch: Disaggregated) -> None:
    command = [sys.executable, "-m", "vllm_dwdp.entrypoints.cli.main", "status", launch.meeting]
    told = subprocess.run(
        [*command, "--json"], capture_output=True, text=True, timeout=60, check=True
    )
    servers = [entry for entry in json.loads(told.stdout) if "url" in entry]
    assert [(each["role"], each["index"], each["url"], each["state"]) for each in servers] == [
        ("prefill", 0, launch.ranks[0], "serving"),
        ("prefill", 1, launch.ranks[1], "serving"),
        ("decode", 0, launch.decode, "serving"),
    ]
    assert {each["pid"] for each in servers} == {
        launch.place(name, role)[0]
        for name, role in (("rank 0", "prefill"), ("rank 1", "prefill"), ("decode 0", "decode"))
    }


def used(url: str) -> float:
    return metric(url, "vllm:kv_cache_usage_perc")


def test_blocks_that_nobody_fetches_are_freed(launch: Disaggregated) -> None:
    """A request that dies on the way: a rank has computed it, and no decode server comes."""
    (rank, _) = launch.ranks
    wait_until(lambda: used(rank) == 0, timeout_s=30)
    asked = GREEDY | {"max_tokens": 1, "kv_transfer_params": TO_BE_FETCHED}
    for number in range(3):
        ask(rank, **asked, prompt=f"{number} {LONG}")
    expired = metric(rank, "vllm:nixl_num_kv_expired_reqs_total")
    assert used(rank) > 0, "nothing is kept, so that the test shows nothing"

    def freed() -> bool:
        ask(rank, **GREEDY, prompt="leases are looked at in steps")
        return used(rank) == 0

    wait_until(freed, timeout_s=10 * LEASE_S)
    assert metric(rank, "vllm:nixl_num_kv_expired_reqs_total") == expired + 3


class Load:
    """Three clients that ask without a break, until the end of its block.

    Args:
        url: that they ask.
        expected: the answer to each prompt.
    """

    NUM_CLIENTS = 3

    def __init__(self, url: str, expected: dict[str, list[Any]]) -> None:
        self.url, self.expected = url, expected
        self.answered: list[float] = []
        self.wrong: list[str] = []
        self.failed: list[tuple[float, str]] = []
        self._end = threading.Event()
        self._pool = ThreadPoolExecutor(self.NUM_CLIENTS)

    def __enter__(self) -> "Load":
        self._clients = [self._pool.submit(self._ask, each) for each in range(self.NUM_CLIENTS)]
        self.wait_for_answers(10)
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._pool.shutdown()
        for client in self._clients:
            client.result()

    def _ask(self, number: int) -> None:
        prompts = [*self.expected]
        while not self._end.is_set():
            prompt = prompts[number % len(prompts)]
            number += 1
            try:
                if choices(ask(self.url, **GREEDY, prompt=prompt)) != self.expected[prompt]:
                    self.wrong.append(prompt)
                self.answered.append(time.monotonic())
            except urllib.error.HTTPError as error:
                self._fail(f"{error.code}: {error.read().decode()[:300]}")
            except (OSError, http.client.HTTPException) as error:
                self._fail(repr(error))

    def _fail(self, why: str) -> None:
        self.failed.append((time.monotonic(), why))
        time.sleep(0.1)

    def wait_for_answers(self, count: int) -> None:
        """Return once so many more have been answered."""
        begun = time.monotonic()
        wait_until(lambda: sum(at > begun for at in self.answered) >= count, timeout_s=90)


@pytest.fixture(scope="module")
def expected(launch: Disaggregated, stock: Server) -> dict[str, list[Any]]:
    prompts = [f"{number} under load " * 20 for number in range(12)]
    return {prompt: choices(ask(stock.url, **GREEDY, prompt=prompt)) for prompt in prompts}


def check_kv_still_moves(launch: Disaggregated) -> None:
    before = fetched(launch)
    for number in range(4):
        ask(launch.url, **GREEDY, prompt=f"{number} after all " * 12)
    wait_until(lambda: fetched(launch) > before)


def test_a_rank_that_is_killed_under_load_costs_no_request(
    launch: Disaggregated, stock: Server, expected: dict[str, list[Any]]
) -> None:
    pid, url = launch.place("rank 1", "prefill")
    prompt = "its rank has died " * 20
    answer = choices(ask(stock.url, **GREEDY, prompt=prompt))
    asked = GREEDY | {"max_tokens": 1, "kv_transfer_params": TO_BE_FETCHED}
    offered = ask(url, **asked, prompt=prompt)
    with Load(launch.url, expected) as load:
        os.killpg(pid, signal.SIGKILL)
        load.wait_for_answers(10)
        launch.place("rank 1", "prefill", 1)
        load.wait_for_answers(20)
    assert not load.wrong and not load.failed
    check_kv_still_moves(launch)
    lost = {"prompt": prompt, "kv_transfer_params": offered["kv_transfer_params"]}
    assert choices(ask(launch.decode, **GREEDY | lost)) == answer, "it computes the prompt itself"


@pytest.mark.feature("Disaggregated serving (NIXL): a killed router or relay")
@pytest.mark.parametrize("name", ["router", "relay"])
def test_what_is_between_may_be_killed_under_load(
    launch: Disaggregated, expected: dict[str, list[Any]], name: str
) -> None:
    """It is started again; meanwhile requests fail, and nothing else does."""
    servers = [launch.place(f"rank {rank}", "prefill")[0] for rank in (0,)]
    servers.append(launch.place("decode 0", "decode")[0])
    served = launch.log.read_text().count("\nall 2 ranks serve at")
    pid = int(launch.line(rf"^{name}: serving, pid (\d+)")[1])
    with Load(launch.url, expected) as load:
        killed = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        launch.line(rf"^{name}: serving, pid (\d+)", 1)
        launch.line("^all 2 ranks serve at", served)
        back = time.monotonic()
        load.wait_for_answers(20)
    print(f"{name}: back after {back - killed:.1f} s, {len(load.failed)} requests failed")
    assert not load.wrong
    assert not [why for at, why in load.failed if not killed < at < back + 1]
    assert load.failed, "nobody asked meanwhile"
    assert all(psutil.pid_exists(each) for each in servers)
    check_kv_still_moves(launch)


def shared_memory(pid: int) -> set[Path]:
    """Return the files of /dev/shm that a server's processes have mapped."""
    family = [pid, *(each.pid for each in psutil.Process(pid).children(recursive=True))]
    maps = [Path(f"/proc/{each}/maps").read_text() for each in family]
    return {Path(each) for each in re.findall(r"(/dev/shm/\S+)$", "\n".join(maps), re.MULTILINE)}


def refusals(launch: Disaggregated, until: Callable[[], bool]) -> list[tuple[int, str]]:
    """Ask without a break; return status and content of what is not answered."""
    refused = []
    while not until():
        try:
            ask(launch.url, **GREEDY, prompt="nobody decodes")
        except urllib.error.HTTPError as error:
            refused.append((error.code, error.read().decode()))
    return refused


def test_a_decode_server_that_is_killed_loses_its_own_streams_and_comes_back(
    launch: Disaggregated, stock: Server
) -> None:
    body = {"prompt": "a stream that breaks", "max_tokens": 1500}
    served = launch.log.read_text().count("\nall 2 ranks serve at")
    begun = len(launch.log.read_text())
    pid, _ = launch.place("decode 0", "decode")
    queues = shared_memory(pid)
    assert queues, "vLLM has none between an engine and its worker"
    with ThreadPoolExecutor(2) as pool:
        streamed = pool.submit(pieces, launch.url, **body)
        whole = pool.submit(ask, launch.url, **GREEDY | body)
        wait_until(lambda: metric(launch.decode, "vllm:num_requests_running") == 2)
        os.kill(pid, signal.SIGKILL)
        refused = refusals(launch, lambda: "\ndecode 0: serving" in launch.log.read_text()[begun:])
        try:
            assert streamed.result(timeout=60)[1] != "data: [DONE]"
        except (OSError, ValueError) as error:
            print(f"the client saw {error!r}")
        with pytest.raises(urllib.error.HTTPError) as lost:
            whole.result(timeout=60)
        print(lost.value.code, lost.value.read().decode())
    print(refused)
    assert refused and {code for code, _ in refused} == {503}
    launch.place("decode 0", "decode", 1)
    assert not [each for each in queues if each.exists()]
    launch.line("^all 2 ranks serve at", served)
    prompt = "and back " * 12
    expected = choices(ask(stock.url, **GREEDY, prompt=prompt))
    assert choices(ask(launch.url, **GREEDY, prompt=prompt)) == expected


@pytest.mark.feature("Disaggregated serving (NIXL): draining")
def test_running_streams_finish_and_new_requests_are_refused_at_the_end(
    launch: Disaggregated,
) -> None:
    """The last test of this launch."""
    body = {"max_tokens": 1800}
    with ThreadPoolExecutor(2) as pool:
        streams = [pool.submit(pieces, launch.url, prompt=f"{n} ends", **body) for n in (1, 2)]
        wait_until(lambda: metric(launch.decode, "vllm:num_requests_running") == 2)
        launch.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "stopping: running requests have" in launch.log.read_text())
        for url in (launch.url, *launch.ranks) * 3:
            with pytest.raises(urllib.error.HTTPError) as refused:
                ask(url, **GREEDY, prompt="something new")
            said = refused.value.read().decode()
            assert refused.value.code == 503, said
            # A second later the router has nobody to ask.
            assert "This launch ends" in said or "No available workers" in said, said
            if url != launch.url:
                assert refused.value.headers["Retry-After"]
        assert metric(launch.ranks[0], "vllm:num_requests_running") == 0, "figures are still read"
        assert not any(stream.done() for stream in streams), "the test shows nothing"
        for stream in streams:
            text, last = stream.result(timeout=120)
            assert last == "data: [DONE]" and len(text) > 100
    assert launch.process.wait(timeout=60) == 0
