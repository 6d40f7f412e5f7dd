"""How our metrics reach vLLM's `/metrics`: a stat logger given to each `AsyncLLM` that runs DWDP.

The official entry point group would also switch statistics on in stock servers that asked for
none. With several API servers only the first exports, so that nothing is counted twice.
"""

import functools
import inspect
from typing import Any

from vllm_dwdp.compat.frontend import backend
from vllm_dwdp.compat.frontend.metrics import RankMetrics
from vllm_dwdp.compat.frontend.polling import StatusPoller
from vllm_dwdp.distributed.launch import DwdpLaunch


def install(launch: DwdpLaunch) -> None:
    """From now on, an `AsyncLLM` of this process exports DWDP metrics if it runs DWDP."""
    from vllm.v1.engine.async_llm import AsyncLLM

    stock = getattr(AsyncLLM.__init__, "dwdp_stock", AsyncLLM.__init__)

    @functools.wraps(stock)
    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(stock).bind(self, vllm_config, *args, **kwargs)
        if backend.is_chosen(vllm_config.parallel_config):
            others = given.arguments.get("stat_loggers") or []
            given.arguments["stat_loggers"] = [*others, make_stat_logger(launch)]
        stock(*given.args, **given.kwargs)

    init.dwdp_stock = stock  # type: ignore[attr-defined]
    AsyncLLM.__init__ = init


def make_stat_logger(launch: DwdpLaunch) -> type:
    """Return a vLLM stat logger class that exports the ranks of `launch`."""
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
    """Return the metrics of this process, which can be registered once only."""
    return RankMetrics(model_name)
