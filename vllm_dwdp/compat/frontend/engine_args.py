"""The one wrapper around stock vLLM: `EngineArgs.create_engine_config`.

Installed in every process that loads vLLM's plugins, so it imports nothing of DWDP before `dwdp` is
chosen. What happens then is `engine_config`.
"""

import functools
from typing import Any

from vllm_dwdp.compat.frontend import backend


def install() -> None:
    """Wrap `EngineArgs.create_engine_config` once; inert unless the backend is `dwdp`."""
    from vllm.engine.arg_utils import EngineArgs

    stock = EngineArgs.create_engine_config
    if hasattr(stock, "dwdp_stock"):
        return

    @functools.wraps(stock)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        build = functools.partial(stock, self, *args, **kwargs)
        if not backend.is_chosen(self):
            return build()
        from vllm_dwdp.compat.frontend.engine_config import create_dwdp_config

        return create_dwdp_config(self, build, headless=kwargs.get("headless", False))

    create_engine_config.dwdp_stock = stock  # type: ignore[attr-defined]
    EngineArgs.create_engine_config = create_engine_config
