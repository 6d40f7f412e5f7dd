"""Offline: `from vllm_dwdp import LLM` over two ranks, one `LLM` for all tests, in this order."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.conftest import Checkpoints, StockEngine
from tests.e2e.engine_process import PROMPTS
from tests.e2e.feature_requests import KV_PROMPTS, NUM_RANKS, REQUESTS
from tests.e2e.matrix import run_cases
from tests.helpers import weight_files
from tests.helpers.waiting import wait_until
from vllm_dwdp.compat.frontend.ranks import ENDPOINT_ENV
from vllm_dwdp.entrypoints.launch.ports import free_ports

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.every_version,
    pytest.mark.timeout(400),
]

SETTINGS = {"enforce_eager": True, "max_num_seqs": 1, "max_model_len": 512, "seed": 0}


def kv_events(num_ports: int) -> dict[str, Any]:
    """Make a configuration whose first port, and those that follow, are free."""
    endpoint = f"tcp://*:{adjacent_ports(num_ports)}"
    return {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": endpoint}


def adjacent_ports(count: int) -> int:
    """Return the first of so many free ports in a row."""
    for first in free_ports(50):
        with contextlib.suppress(OSError), contextlib.ExitStack() as bound:
            for port in range(first, first + count):
                bound.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise AssertionError("no ports")


@pytest.fixture(scope="module")
def wrapped_before() -> set[str]:
    return wrapped()


@pytest.fixture(scope="module")
def llm(checkpoints: Checkpoints, wrapped_before: set[str]) -> Iterator[Any]:
    from vllm_dwdp import LLM

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.syspath_prepend(weight_files.PLUGINS)  # which engines inherit
        weight_files.register()
        made = LLM(
            checkpoints("qwen3_moe", 8),
            data_parallel_size=2,
            disable_log_stats=False,
            kv_events_config=kv_events(NUM_RANKS),
            weight_transfer_config={"backend": weight_files.NAME},
            **SETTINGS,
        )
    try:
        yield made
    finally:
        made.llm_engine.engine_core.shutdown()


@pytest.fixture
def expected(stock: StockEngine, checkpoints: Checkpoints) -> list[list[int]]:
    tokens: list[list[int]] = stock(checkpoints("qwen3_moe", 8))["tokens"]
    return tokens


@pytest.fixture(scope="module")
def stock_answers(
    checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Return what one stock `LLM` answers to some of `feature_requests.REQUESTS`."""
    settings = SETTINGS | {"kv_events_config": kv_events(1)}
    case = {"name": "stock", "model": checkpoints("qwen3_moe", 8), "llm": settings}
    requests = ["chat", "several", "beams", "kv_events"]
    case |= {"run": "tests.e2e.feature_requests:run", "requests": requests}
    (result,) = run_cases(tmp_path_factory.mktemp("offline"), "stock", [case])["stock"]
    answers: dict[str, Any] = result["answers"]
    return answers


def params(max_tokens: int = 12) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def tokens_of(outputs: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.feature("Offline `LLM` over several ranks: `generate`, `chat`")
def test_generate_and_chat_in_order(
    llm: Any, expected: list[list[int]], stock_answers: dict[str, Any]
) -> None:
    warm = [entry["steps"]["direct"] for entry in llm.dwdp_status()]
    prompts = PROMPTS * 5
    outputs = llm.generate(prompts, params())
    assert [output.prompt for output in outputs] == prompts
    assert tokens_of(outputs) == expected * 5

    status = llm.dwdp_status()
    assert [entry["rank"] for entry in status] == [0, 1]
    steps = [entry["steps"]["direct"] for entry in status]
    assert all(now > then for now, then in zip(steps, warm, strict=True)), "only one rank worked"

    assert REQUESTS["chat"](llm) == stock_answers["chat"]


@pytest.mark.feature("Offline `LLM` over several ranks: several samples of a prompt, beam search")
def test_samples_and_beams_of_several_ranks(llm: Any, stock_answers: dict[str, Any]) -> None:
    """Each sample, and each beam in each step, is a request of its own, and goes where there is room."""
    assert REQUESTS["several"](llm) == stock_answers["several"]
    beams, expected = REQUESTS["beams"](llm), stock_answers["beams"]
    assert [tokens for tokens, _ in beams] == [tokens for tokens, _ in expected]
    assert [score for _, score in beams] == pytest.approx([score for _, score in expected])


@pytest.mark.feature("Offline `LLM` over several ranks: `enqueue` and `wait_for_completion`")
def test_requests_that_are_enqueued(llm: Any, expected: list[list[int]]) -> None:
    for prompt in PROMPTS * 2:
        llm.enqueue(prompt, params(), use_tqdm=False)
    assert tokens_of(llm.wait_for_completion(use_tqdm=False)) == expected * 2


@pytest.mark.feature("KV events of each rank (`--kv-events-config`)")
def test_every_rank_tells_which_blocks_it_has(llm: Any, stock_answers: dict[str, Any]) -> None:
    """Over ZMQ at a port of its own, with its number; together they have what one engine has."""
    found = REQUESTS["kv_events"](llm)
    assert sorted(found) == [0, 1]
    (expected,) = stock_answers["kv_events"].values()
    assert len(expected) >= len(KV_PROMPTS)
    assert sorted(found[0] + found[1]) == sorted(expected)


@pytest.mark.usefixtures("llm")
def test_a_rank_is_one_process_on_its_own_cores() -> None:
    from vllm_dwdp.compat.worker.cpu import split_cores

    assert not processes("VLLM::Worker")
    assert not processes("DPCoordinator"), "nobody asks it"
    engines = sorted(processes("VLLM::EngineCore"), key=lambda engine: engine.cmdline())
    cores = [sorted(engine.cpu_affinity()) for engine in engines]
    assert cores == [sorted(split_cores(rank, 2)) for rank in (0, 1)]


@pytest.mark.feature("Offline metrics (`get_metrics`)")
def test_metrics_are_kept_for_each_rank_and_sum_up(llm: Any) -> None:
    before = summed(llm, "vllm:generation_tokens"), summed(llm, "vllm:request_success")
    llm.generate(PROMPTS * 5, params(), use_tqdm=False)
    assert summed(llm, "vllm:generation_tokens") - before[0] == 12 * len(PROMPTS) * 5
    assert summed(llm, "vllm:request_success") - before[1] == len(PROMPTS) * 5
    for name in ("vllm:generation_tokens", "vllm:num_requests_running", "vllm:kv_cache_usage_perc"):
        assert engines(llm, name) == {"0", "1"}, name
    both = [metric.value for metric in llm.get_metrics() if metric.name == "vllm:generation_tokens"]
    assert len(both) == 2 and min(both) > 0
    assert summed(llm, "vllm:num_requests_running") == 0


def summed(llm: Any, name: str) -> float:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


def engines(llm: Any, name: str) -> set[str]:
    return {metric.labels["engine"] for metric in llm.get_metrics() if metric.name == name}


@pytest.fixture
def interruptible() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.feature("Ctrl-C in an offline call")
@pytest.mark.usefixtures("interruptible")
def test_after_ctrl_c_the_next_call_returns_its_own_outputs(
    llm: Any, expected: list[list[int]]
) -> None:
    """As a terminal does it: every process of the job gets the signal."""

    children = psutil.Process().children(recursive=True)
    engines = [child for child in children if "VLLM" in " ".join(child.cmdline())]
    assert len(engines) >= 2

    def interrupt() -> None:
        for process in [*engines, psutil.Process()]:
            process.send_signal(signal.SIGINT)

    for _ in range(2):
        timer = threading.Timer(1.5, interrupt)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["of the call that is interrupted"] * 40, params(400), use_tqdm=False)
        timer.join()
        outputs = llm.generate(PROMPTS, params(), use_tqdm=False)
        assert [output.prompt for output in outputs] == PROMPTS
        assert tokens_of(outputs) == expected
    assert all(wait_for_rest(llm)), "a rank went on with what was aborted"


def wait_for_rest(llm: Any) -> list[bool]:
    """Whether each rank takes no more steps."""

    def steps() -> list[int]:
        return [sum(status["steps"].values()) for status in llm.dwdp_status()]

    before = steps()
    time.sleep(0.5)
    return [now == then for now, then in zip(steps(), before, strict=True)]


@pytest.mark.feature("sleep and wake_up")
@pytest.mark.feature("reload_weights")
def test_ranks_sleep_get_new_weights_and_wake_up(
    llm: Any, expected: list[list[int]], stock: StockEngine, checkpoints: Checkpoints
) -> None:
    """As a trainer does it. On a CPU sleeping is pausing, in stock vLLM too: no memory is released."""
    old, new = checkpoints("qwen3_moe", 8), checkpoints("qwen3_moe", 8, seed=1)
    for level in (1, 2):
        llm.sleep(level=level)
        assert llm.llm_engine.is_sleeping()
        llm.wake_up(tags=["weights"])
        assert llm.llm_engine.is_sleeping()
        model = new if level == 1 else old
        llm.collective_rpc("reload_weights", kwargs={"weights_path": model})
        llm.wake_up()
        assert not llm.llm_engine.is_sleeping()
        tokens = tokens_of(llm.generate(PROMPTS, params(), use_tqdm=False))
        assert tokens == (stock(new)["tokens"] if level == 1 else expected)
        assert [status["weight_update"] for status in llm.dwdp_status()] == [level] * 2
    llm.sleep(level=0)
    llm.wake_up(tags=["scheduling"])
    assert tokens_of(llm.generate(PROMPTS, params(), use_tqdm=False)) == expected


@pytest.mark.feature("weight transfer (start, update, finish)")
def test_a_trainer_sends_weights_and_their_version(
    llm: Any, expected: list[list[int]], stock: StockEngine, checkpoints: Checkpoints
) -> None:
    """By the methods of `LLM`, a chunk at a time; every rank gets every call."""
    old, new = checkpoints("qwen3_moe", 8), checkpoints("qwen3_moe", 8, seed=1)
    updates = [status["weight_update"] for status in llm.dwdp_status()]
    llm.init_weight_transfer_engine({"init_info": {}})
    for step, model in (("1", new), ("2", old)):
        llm.sleep(level=0)
        llm.start_weight_update()
        for parts in weight_files.parts_of(model):
            llm.update_weights({"update_info": {"folder": model, "parts": parts}})
        llm.finish_weight_update(f"step {step}")
        llm.reset_prefix_cache()
        llm.wake_up(tags=["scheduling"])
        assert llm.get_weight_version() == f"step {step}"
        outputs = llm.generate(PROMPTS * 2, params(), use_tqdm=False)
        assert tokens_of(outputs) == (stock(new)["tokens"] if model == new else expected) * 2
        found = [status["weight_update"] for status in llm.dwdp_status()]
        assert found == [update + int(step) for update in updates]
        assert len({status["weights"]["digest"] for status in llm.dwdp_status()}) == 1


def wrapped() -> set[str]:
    """Names of vLLM that are ours at the moment."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine import async_llm, core_client, llm_engine, utils

    found = {
        "AsyncLLM.__init__": async_llm.AsyncLLM.__init__,
        "StatLoggerManager": llm_engine.StatLoggerManager,
        "StatLoggerManager.record": llm_engine.StatLoggerManager.record,
        "load_stat_logger_plugin_factories": async_llm.load_stat_logger_plugin_factories,
        "wait_for_engine_startup": utils.wait_for_engine_startup,
        "launch_core_engines": core_client.launch_core_engines,
        "make_client": core_client.EngineCoreClient.make_client,
    }
    stock = getattr(EngineArgs.create_engine_config, "dwdp_stock", None)
    assert stock is None or stock.__module__.startswith("vllm.")
    return {
        name
        for name, thing in found.items()
        if not thing.__module__.startswith("vllm.") or hasattr(thing, "dwdp_stock")
    }


def test_an_engine_that_is_made_now_is_stock(llm: Any, wrapped_before: set[str]) -> None:
    assert wrapped() <= wrapped_before
    assert ENDPOINT_ENV not in os.environ


def test_calls_to_a_dead_rank_end_with_its_name(llm: Any) -> None:
    victim = processes("VLLM::EngineCore")[0]
    os.kill(victim.pid, signal.SIGKILL)
    for call in (
        llm.dwdp_status,
        llm.reset_prefix_cache,
        lambda: llm.generate(PROMPTS, params(), use_tqdm=False),
    ):
        began = time.monotonic()
        with pytest.raises(Exception, match=r"DWDP rank [01] \(EngineCore_DP[01]\) died"):
            call()
        assert time.monotonic() - began < 30


def test_an_llm_that_fails_when_its_engines_run_leaves_none(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM reads the chat template after the engines have started."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm_dwdp import LLM

    before = set(processes("VLLM::EngineCore"))  # some of which may be ending
    with pytest.raises(Exception, match=r"missing\.jinja") as failure:
        LLM(
            checkpoints("qwen3_moe", 8),
            data_parallel_size=2,
            chat_template="./missing.jinja",
            **SETTINGS,
        )
    assert failure.traceback, "held, as by a shell that shows it"
    wait_until(lambda: set(processes("VLLM::EngineCore")) <= before)


@pytest.mark.feature("Worker processes (`executor` `mp`)")
def test_worker_processes_on_request(
    stock: StockEngine, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The option `executor`: the same tokens and status, and a dead worker is named alike."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import SamplingParams

    from tests.e2e.engine_process import PROMPTS
    from vllm_dwdp import LLM

    model = checkpoints("qwen3_moe", 8)
    expected = stock(model)
    options = {"dwdp": {"executor": "mp"}}
    llm = LLM(model, data_parallel_size=2, additional_config=options, **SETTINGS)
    try:
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        outputs = llm.generate(PROMPTS, params)
        assert [list(output.outputs[0].token_ids) for output in outputs] == expected["tokens"]
        assert [entry["rank"] for entry in llm.collective_rpc("dwdp_status")] == [0, 1]
        workers = processes("VLLM::Worker")
        assert len(workers) == 2
        workers[0].kill()
        with pytest.raises(Exception, match=r"DWDP .*died"):
            llm.generate(PROMPTS, params, use_tqdm=False)
    finally:
        llm.llm_engine.engine_core.shutdown()


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_a_rank_of_several_cores_has_a_thread_on_each(
    expected: list[list[int]], checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process, as any rank; its main thread, from which others inherit, is free between steps."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm_dwdp import LLM
    from vllm_dwdp.compat.worker.cpu import split_cores

    llm = LLM(checkpoints("qwen3_moe", 8), **SETTINGS)
    try:
        assert tokens_of(llm.generate(PROMPTS, params(), use_tqdm=False)) == expected
        assert not processes("VLLM::Worker")
        (engine,) = processes("VLLM::EngineCore")
        cores = split_cores(0, 1)
        assert sorted(engine.cpu_affinity()) == sorted(cores)
        found = [os.sched_getaffinity(thread.id) for thread in engine.threads()]
        pinned = sorted(next(iter(each)) for each in found if len(each) == 1)
        assert pinned == sorted(cores[1:]), "one thread on each core but the first"
    finally:
        llm.llm_engine.engine_core.shutdown()


IN_SMALL_SHARED_MEMORY = (
    *("unshare", "--mount", "--propagation", "private", "sh", "-c"),
    'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"',
    "sh",
)
"""As in a container: Docker gives 64 MiB unless it is told otherwise."""

GENERATE = """
import sys
from vllm import SamplingParams
from vllm_dwdp import LLM

if __name__ == "__main__":
    llm = LLM(sys.argv[1], data_parallel_size=2, max_model_len=512, enforce_eager=True)
    (output,) = llm.generate("hello", SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    print("TOKENS", len(output.outputs[0].token_ids))
"""


@pytest.mark.feature("Containers with 64 MiB of /dev/shm")
def test_ranks_start_with_the_shared_memory_of_a_container(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    if subprocess.run([*IN_SMALL_SHARED_MEMORY, "true"], check=False).returncode != 0:
        pytest.skip("mounting takes root")
    script = tmp_path / "generate.py"
    script.write_text(GENERATE)
    command = [*IN_SMALL_SHARED_MEMORY, sys.executable, str(script), checkpoints("mixtral", 8)]
    ended = subprocess.run(
        command,
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert "TOKENS 4" in ended.stdout, ended.stdout[-4000:]


def processes(name: str) -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # also a zombie
            if name in " ".join(child.cmdline()):
                found.append(child)
    return found
