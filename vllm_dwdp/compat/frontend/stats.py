"""How our metrics reach vLLM's `/metrics`: a stat logger added in DWDP front ends only.

The official entry point group would also switch statistics on in stock servers that asked for
none, so the factory list is extended here instead, and only after `dwdp` was chosen.
"""

import functools
from typing import Any

from vllm_dwdp.distributed.launch import DwdpLaunch


def install(launch: DwdpLaunch) -> None:
    """From now on, `AsyncLLM` engines of this process also export DWDP metrics."""
    from vllm.v1.engine import async_llm

    from vllm_dwdp.compat.frontend.metrics import make_stat_logger

    stock = async_llm.load_stat_logger_plugin_factories
    stock = getattr(stock, "dwdp_stock", stock)

    @functools.wraps(stock)
    def load_factories() -> list[Any]:
        return [*stock(), make_stat_logger(launch)]

    load_factories.dwdp_stock = stock  # type: ignore[attr-defined]
    async_llm.load_stat_logger_plugin_factories = load_factories
