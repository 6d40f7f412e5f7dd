"""Offline inference over several independent ranks, with vLLM's own `LLM` interface."""

import os
from contextlib import ExitStack
from typing import Any

from vllm_dwdp.compat.frontend import startup
from vllm_dwdp.compat.frontend.backend import BACKEND, offline_data_parallel
from vllm_dwdp.compat.frontend.engine_args import install
from vllm_dwdp.compat.frontend.interruptible import InterruptibleLLM
from vllm_dwdp.compat.frontend.interrupts import engines_without_interrupts
from vllm_dwdp.compat.frontend.offline import rank_client
from vllm_dwdp.compat.frontend.own_engines import while_offline_engines_start
from vllm_dwdp.compat.frontend.ranks import ENDPOINT_ENV
from vllm_dwdp.errors import DwdpConfigError


class LLM(InterruptibleLLM):
    """`vllm.LLM` whose requests are served by `data_parallel_size` ranks that share the experts.

    Everything else is vLLM's: `generate`, `chat`, progress bars, outputs in prompt order. Ctrl-C ends
    the call that it comes in; the next one begins afresh. `get_metrics` tells the ranks apart by the
    label `engine`.

    Args:
        model: as for `vllm.LLM`.
        data_parallel_size: ranks, each its own engine process.
        kwargs: as for `vllm.LLM`; DWDP options go into `additional_config={"dwdp": {...}}`.

    Source: vLLM's `EngineCoreClient.make_client` is wrapped while the engines start
    (`compat.frontend.offline`), and is vLLM's own again afterwards.

    Raises:
        DwdpConfigError: a setting cannot be used; the message names it and the fix.
    """

    def __init__(self, model: str, *, data_parallel_size: int = 1, **kwargs: Any) -> None:
        if not isinstance(data_parallel_size, int) or data_parallel_size < 1:
            raise DwdpConfigError(
                f"data_parallel_size={data_parallel_size!r} must be an integer of at least 1."
            )
        backend = kwargs.setdefault("distributed_executor_backend", BACKEND)
        if backend != BACKEND:
            raise DwdpConfigError(
                f"distributed_executor_backend={backend!r}: vllm_dwdp.LLM runs on {BACKEND!r}. "
                "Leave it out, or use vllm.LLM."
            )
        install()
        with ExitStack() as stack:
            stack.enter_context(while_offline_engines_start())
            stack.enter_context(engines_without_interrupts())
            if data_parallel_size > 1:
                # What is wrapped is vLLM's own again when the engines run.
                stack.callback(os.environ.pop, ENDPOINT_ENV, None)
                stack.callback(startup.uninstall)
                stack.enter_context(offline_data_parallel(data_parallel_size))
                stack.enter_context(rank_client())
            super().__init__(model, **kwargs)

    def dwdp_status(self) -> list[dict[str, Any]]:
        """Each rank's status: mode, resident and remote bytes, bytes fetched, waits, steps.

        Quantities carry their unit in their name (`_bytes`, `_seconds`, `_tokens`); counts are since the
        start. Of ranks with several workers (`tensor_parallel_size`) one for each worker, of its slice.

        Raises:
            EngineDeadError: vLLM's; a rank is dead, and the message names it.
        """
        status: list[dict[str, Any]] = self.collective_rpc("dwdp_status")
        return status
