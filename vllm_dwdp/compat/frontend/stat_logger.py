"""How our metrics reach vLLM's `/metrics`: a stat logger added in DWDP front ends only.

The official entry point group would also switch statistics on in stock servers that asked for
none, so the factory list is extended here instead, and only after `dwdp` was chosen. With several API
servers only the first exports, so that nothing is counted twice.
"""

import functools
from typing import Any

from vllm_dwdp.compat.frontend.metrics import RankMetrics
from vllm_dwdp.compat.frontend.polling import StatusPoller
from vllm_dwdp.distributed.launch import DwdpLaunch


def install(launch: DwdpLaunch) -> None:
    """From now on, `AsyncLLM` engines of this process also export DWDP metrics."""
    from vllm.v1.engine import async_llm

    stock = async_llm.load_stat_logger_plugin_factories
    stock = getattr(stock, "dwdp_stock", stock)

    @functools.wraps(stock)
    def load_factories() -> list[Any]:
        return [*stock(), make_stat_logger(launch)]

    load_factories.dwdp_stock = stock  # type: ignore[attr-defined]
    async_llm.load_stat_logger_plugin_factories = load_factories


def make_stat_logger(launch: DwdpLaunch) -> type:
    """A vLLM stat logger class that exports the ranks of `launch`."""
    from vllm.v1.metrics.loggers import AggregateStatLoggerBase

    class DwdpStatLogger(AggregateStatLoggerBase):
        """Starts the poller; vLLM's own statistics are of no interest to it."""

        def __init__(self, vllm_config: Any, engine_indexes: list[int]) -> None:
            self._vllm_config = vllm_config
            self._engines = list(engine_indexes)

        def record(self, *args: Any, **kwargs: Any) -> None:
            """No-op: ranks are polled, not counted per iteration."""

        def log_engine_initialized(self) -> None:
            """Start exporting. Not earlier: vLLM's own logger, made after us, clears `vllm:*`."""
            if self._vllm_config.parallel_config._api_process_rank > 0:
                return
            name = self._vllm_config.model_config.served_model_name
            metrics = _process_metrics(name if isinstance(name, str) else name[0])
            if launch.config.shares_experts:
                StatusPoller(launch, self._engines, metrics)
                return
            for engine in self._engines:
                metrics.update(engine, {"mode": "replica", "saved_bytes": 0})

    return DwdpStatLogger


@functools.cache
def _process_metrics(model_name: str) -> RankMetrics:
    """The metrics of this process, which can be registered once only."""
    return RankMetrics(model_name)
