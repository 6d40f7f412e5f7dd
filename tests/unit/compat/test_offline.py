"""The offline client and its interrupts, over engines that are only said to exist."""

import itertools
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine.core_client import SyncMPClient
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_dwdp.compat.frontend import offline
from vllm_dwdp.compat.frontend.interruptible import aborted_if_cut_short
from vllm_dwdp.compat.frontend.interrupts import blocked_interrupts, uninterrupted
from vllm_dwdp.compat.frontend.offline import RankClient
from vllm_dwdp.entrypoints.llm import LLM
from vllm_dwdp.errors import DwdpError, DwdpUnsupportedError

pytestmark = pytest.mark.timeout(30)


class Client(RankClient):
    """A client of two ranks of which nothing runs; keeps what it sends."""

    def __init__(self, capacity: int = 2, has_priorities: bool = False) -> None:
        names = ["EngineCore_DP0", "EngineCore_DP1"]
        manager = SimpleNamespace(
            failed_proc_name=None,
            manager_stopped=threading.Event(),
            processes=[SimpleNamespace(name=name) for name in names],
        )
        self.resources: Any = SimpleNamespace(engine_dead=False, engine_manager=manager)
        self.core_engines = [b"0", b"1"]
        self.utility_results: dict[int, Any] = {}
        self.sent: list[tuple[int, Any, Any]] = []
        self._capacity = capacity
        self._has_priorities = has_priorities
        self._waiting = []
        self._arrivals = itertools.count()
        self._unfinished = [set(), set()]

    def shutdown(self, timeout: float | None = None) -> None:
        """Nothing to stop."""

    def _send_to(self, rank: int, request_type: EngineCoreRequestType, request: Any) -> None:
        self.ensure_alive()
        self.sent.append((rank, request_type, request))

    def answer(self, rank: int, answer: Any) -> None:
        """Answer the utility call of `rank` as the thread that reads the engines does."""
        (call_id,) = (request[1] for to, _, request in self.sent if to == rank)
        future: Future[Any] = self.utility_results[call_id]
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)

    def die(self, rank: int) -> None:
        manager = self.resources.engine_manager
        manager.failed_proc_name = manager.processes[rank].name
        manager.manager_stopped.set()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "LIVENESS_INTERVAL_S", 0.05)


@pytest.fixture
def interruptible() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def after(seconds: float, do: Any, *args: Any) -> None:
    threading.Timer(seconds, do, args).start()


def test_requests_go_where_there_is_room_and_aborts_make_some() -> None:
    client = Client(capacity=1)
    for name in "abcd":
        client.add_request(SimpleNamespace(request_id=name))  # type: ignore[arg-type]
    assert [(rank, request.request_id) for rank, _, request in client.sent] == [(0, "a"), (1, "b")]
    client.sent.clear()
    client.abort_requests(["b", "c", "unknown"])
    abort, add = client.sent
    assert abort == (1, EngineCoreRequestType.ABORT, ["b"])
    assert (add[0], add[2].request_id) == (1, "d")


@pytest.mark.parametrize(("has_priorities", "order"), [(False, "abcdefg"), (True, "abgcedf")])
def test_what_waits_goes_by_the_scheduling_policy(has_priorities: bool, order: str) -> None:
    """As in vLLM's scheduler: a lower number goes first, and of equal ones the earlier."""
    client = Client(capacity=1, has_priorities=has_priorities)
    for name, priority in zip("abcdefg", (9, 9, 2, 5, 2, 5, -1), strict=True):
        client.add_request(SimpleNamespace(request_id=name, priority=priority))  # type: ignore[arg-type]
    while len(client.sent) < len(order):
        client._unfinished[0].clear()
        client._feed()
    assert "".join(request.request_id for _, _, request in client.sent) == order


@pytest.mark.parametrize(("policy", "capacity"), [("fcfs", 10), ("priority", 8)])
def test_nothing_waits_in_a_rank_where_priorities_count(
    policy: str, capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SyncMPClient, "__init__", lambda self, config: None)
    monkeypatch.setattr(SyncMPClient, "__del__", lambda self: None, raising=False)
    monkeypatch.setattr(RankClient, "core_engines", [b"0", b"1"], raising=False)
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=8, policy=policy))
    client = RankClient(config)
    assert client._capacity == capacity


def test_answers_are_joined_in_rank_order() -> None:
    client = Client()
    after(0.1, lambda: [client.answer(1, ["one"]), client.answer(0, ["zero"])])
    assert client.call_utility("collective_rpc", "f") == ["zero", "one"]


@pytest.mark.parametrize(
    ("method", "answers", "expected"),
    [
        ("list_loras", ([1, 2], {2, 3}), {2}),
        ("list_loras", ([], [1]), set()),
        ("add_lora", (True, False), False),
        ("pin_lora", (True, True), True),
        ("remove_lora", (False, True), True),
        ("remove_lora", (False, False), False),
        ("reset_prefix_cache", (True, False), False),
        ("get_weight_version", ("7", "7"), "7"),
        ("profile", (None, None), None),
        (
            "get_supported_tasks",
            (["embed", "token_embed"], ["token_embed", "embed"]),
            ["embed", "token_embed"],
        ),
    ],
)
def test_one_answer_is_that_of_all_ranks(
    method: str, answers: tuple[Any, Any], expected: Any
) -> None:
    for first, second in (answers, answers[::-1]):
        client = Client()
        after(0.05, lambda c=client, a=first, b=second: [c.answer(1, b), c.answer(0, a)])
        assert client.call_utility(method) == expected


def test_ranks_that_answer_differently_are_said() -> None:
    client = Client()
    after(0.05, lambda: [client.answer(0, "7"), client.answer(1, "8")])
    with pytest.raises(DwdpError, match=r"get_weight_version has one answer, and .* \['7', '8'\]"):
        client.call_utility("get_weight_version")


def test_a_rank_that_dies_while_it_is_asked_is_named() -> None:
    client = Client()
    after(0.1, client.answer, 0, True)
    after(0.2, client.die, 1)
    with pytest.raises(EngineDeadError, match=r"DWDP rank 1 \(EngineCore_DP1\) died"):
        client.call_utility("reset_prefix_cache")
    with pytest.raises(EngineDeadError, match="DWDP rank 1 "):
        client.call_utility("reset_prefix_cache")


def test_cancelled_by_a_rank_that_dies_is_not_all_that_is_said() -> None:
    client = Client()
    after(0.1, client.answer, 0, Exception("Call to collective_rpc method failed: cancelled"))
    after(0.3, client.die, 0)
    with pytest.raises(EngineDeadError, match="DWDP rank 0 "):
        client.call_utility("collective_rpc", "f")


def test_an_error_of_a_living_rank_is_its_own() -> None:
    client = Client()
    after(0.1, lambda: [client.answer(0, True), client.answer(1, Exception("no such method"))])
    with pytest.raises(Exception, match="no such method") as caught:
        client.call_utility("what")
    assert caught.value.__notes__ == ["This is the answer of DWDP rank 1."]


def test_a_client_that_was_closed_says_so_at_once() -> None:
    client = Client()
    client.resources.engine_dead = True
    client.resources.engine_manager.manager_stopped.set()
    with pytest.raises(EngineDeadError, match="this LLM have ended: it was closed"):
        client.call_utility("reset_prefix_cache")


class Engine:
    """Remembers what was aborted."""

    def __init__(self) -> None:
        self.output_processor = SimpleNamespace(
            request_states=dict.fromkeys("ab"), parent_requests={"p": None}
        )
        self.aborted: list[str] = []

    def abort_request(self, names: list[str], internal: bool) -> None:
        assert internal
        self.aborted = names


@pytest.mark.parametrize(
    ("keep_earlier", "aborted"), [(True, ["c", "q"]), (False, ["a", "b", "c", "p", "q"])]
)
def test_what_an_interrupted_call_had_asked_for_is_aborted(
    keep_earlier: bool, aborted: list[str]
) -> None:
    engine = Engine()

    def call() -> None:
        with aborted_if_cut_short(engine, keep_earlier=keep_earlier):
            engine.output_processor.request_states["c"] = None
            engine.output_processor.parent_requests["q"] = None
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call()
    assert engine.aborted == aborted


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_waits_until_the_message_is_sent() -> None:
    done = []

    def send() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append("sent")

    with pytest.raises(KeyboardInterrupt):
        send()
    assert done == ["sent"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("interruptible")
def test_a_process_that_is_started_with_interrupts_blocked_never_gets_one() -> None:
    with blocked_interrupts():
        deaf = subprocess.Popen(["sleep", "60"])
    try:
        deaf.send_signal(signal.SIGINT)
        time.sleep(0.2)
        assert deaf.poll() is None
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        deaf.terminate()
    assert deaf.wait(timeout=10) == -signal.SIGTERM


def test_ranks_that_would_all_run_in_this_process_are_refused_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stock vLLM's engine in this process would wait for the others before it makes its client."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with pytest.raises(
        DwdpUnsupportedError, match="data_parallel_size=2 needs one process per rank"
    ):
        LLM("model", data_parallel_size=2)
