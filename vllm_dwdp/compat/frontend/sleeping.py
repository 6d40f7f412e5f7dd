"""Sleep mode is refused before vLLM pauses its engines for it.

vLLM pauses first and asks the workers then: after their refusal the engine would stay paused, and
healthy. Level 0 only pauses and is allowed.
"""

import functools
from typing import Any

from vllm_dwdp.compat.frontend import backend
from vllm_dwdp.errors import DwdpUnsupportedError


def refuse_sleep(level: int) -> None:
    """Refuse levels that would take memory away.

    Raises:
        DwdpUnsupportedError: `level` is above 0.
    """
    if level > 0:
        raise DwdpUnsupportedError(
            f"sleep level {level} is not supported with --distributed-executor-backend dwdp: peers "
            "read this rank's experts while it would sleep. The engine goes on. Use level 0 to pause "
            "it, or end the ranks."
        )


def install() -> None:
    """From now on, engines of this process that run DWDP refuse to sleep; others are stock."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine

    for engine_class in (AsyncLLM, LLMEngine):
        _wrap(engine_class)


def _wrap(engine_class: Any) -> None:
    stock = engine_class.sleep
    if hasattr(stock, "dwdp_stock"):
        return

    @functools.wraps(stock)
    def sleep(self: Any, level: int = 1, *args: Any, **kwargs: Any) -> Any:
        if backend.is_chosen(self.vllm_config.parallel_config):
            refuse_sleep(level)
        return stock(self, level, *args, **kwargs)

    sleep.dwdp_stock = stock  # type: ignore[attr-defined]
    engine_class.sleep = sleep
