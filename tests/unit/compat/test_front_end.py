"""What a DWDP front end wraps is vLLM's own for every other engine of the process."""

import signal
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.engine import utils
from vllm.v1.engine.async_llm import AsyncLLM

from vllm_dwdp.compat.frontend import startup, stat_logger
from vllm_dwdp.compat.frontend.backend import EXECUTOR_CLS

LAUNCH: Any = SimpleNamespace(config=SimpleNamespace(shares_experts=True))


def config(backend: str) -> Any:
    parallel_config = SimpleNamespace(distributed_executor_backend=backend)
    return SimpleNamespace(parallel_config=parallel_config)


def test_only_an_engine_that_runs_dwdp_is_given_our_stat_logger(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def init(
        self: Any, vllm_config: Any, log_stats: bool, stat_loggers: list[Any] | None = None
    ) -> None:
        self.stat_loggers = stat_loggers

    monkeypatch.setattr(AsyncLLM, "__init__", init)
    for _ in range(2):  # a second front end adds no second logger
        stat_logger.install(LAUNCH)
    make: Any = AsyncLLM
    assert make(config("mp"), False).stat_loggers is None
    assert make(config("mp"), False, ["theirs"]).stat_loggers == ["theirs"]
    theirs, ours = make(config(EXECUTOR_CLS["uni"]), False, stat_loggers=["theirs"]).stat_loggers
    assert (theirs, ours.__name__) == ("theirs", "DwdpStatLogger")


def test_only_the_start_of_dwdp_engines_is_ended_by_signals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handlers: list[bool] = []
    before = signal.getsignal(signal.SIGTERM)

    def wait(handshake_socket: Any, parallel_config: Any) -> None:
        handlers.append(signal.getsignal(signal.SIGTERM) is not before)

    monkeypatch.setattr(utils, "wait_for_engine_startup", wait)
    startup.install()
    for backend in ("mp", EXECUTOR_CLS["uni"]):
        utils.wait_for_engine_startup(None, config(backend).parallel_config)
    assert handlers == [False, True]
    startup.uninstall()
    assert utils.wait_for_engine_startup is wait
