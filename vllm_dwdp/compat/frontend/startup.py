"""SIGINT and SIGTERM while engines start: vLLM's front end must end, not wait on.

Stock vLLM swallows the interrupt in its handshake context (`zmq_socket_ctx`) or, under asyncio,
defers it until the loop runs again, and then waits for engines that ignore SIGTERM while they are
built. Stock engines are up soon after; a DWDP rank may be waiting minutes for a peer.
"""

import functools
import inspect
from typing import Any

from vllm_dwdp.compat.frontend import backend
from vllm_dwdp.compat.worker.signals import ended_by_signals


def install() -> None:
    """From now on, this front end ends at once when it is interrupted while DWDP engines start."""
    from vllm.v1.engine import utils

    stock = utils.wait_for_engine_startup
    if hasattr(stock, "dwdp_stock"):
        return

    @functools.wraps(stock)
    def wait_for_engine_startup(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(stock).bind(*args, **kwargs).arguments
        if not backend.is_chosen(given["parallel_config"]):
            return stock(*args, **kwargs)
        with ended_by_signals():
            return stock(*args, **kwargs)

    wait_for_engine_startup.dwdp_stock = stock  # type: ignore[attr-defined]
    utils.wait_for_engine_startup = wait_for_engine_startup


def uninstall() -> None:
    """Put vLLM's own function back."""
    from vllm.v1.engine import utils

    stock = utils.wait_for_engine_startup
    utils.wait_for_engine_startup = getattr(stock, "dwdp_stock", stock)
