"""What `vllm serve` with independent ranks does differently where the user leaves it open.

Installed in the process of the command line only, before it runs the command.
"""

import functools
import os
import sys
from typing import Any

from vllm_dwdp.compat.frontend import backend

SERVE_MODULE = "vllm.entrypoints.cli.serve"


def install() -> None:
    """Wrap the command `serve` once, if this process has it; inert unless the backend is `dwdp`."""
    module = sys.modules.get(SERVE_MODULE)
    if module is None:
        return
    command = module.ServeSubcommand
    stock = command.cmd
    if hasattr(stock, "dwdp_stock"):
        return

    @functools.wraps(stock)
    def cmd(args: Any) -> None:
        if backend.is_chosen(args):
            choose_defaults(args)
        stock(args)

    cmd.dwdp_stock = stock  # type: ignore[attr-defined]
    command.cmd = staticmethod(cmd)


def choose_defaults(args: Any) -> None:
    """Complete the arguments of the command, and what its children inherit.

    On the CPU one API server is enough for several ranks, where vLLM starts one for each: every core
    computes, and each server costs the start of a process that has imported vLLM.
    """
    from vllm_dwdp.distributed.launch import SHARED_CORES_ENV

    if args.data_parallel_multi_port_external_lb:
        os.environ[SHARED_CORES_ENV] = "1"  # one server for each rank, all on our cores
    elif args.api_server_count is None and not args.headless and _computes_on_cores():
        args.api_server_count = 1


def _computes_on_cores() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())
