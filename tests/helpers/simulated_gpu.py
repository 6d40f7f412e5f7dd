"""Whole servers on CPU kernels whose expert memory is the CUDA device's over the fake driver. NOT A GPU.

`environment` makes a started program, and every process of its engines, use it and meet over `tcp://` as
ranks on GPUs do: their experts travel as fabric handles. A vLLM plugin in `simulated_plugins/` calls
`install` in each.
"""

import os
from pathlib import Path

from gpu_checks.fake import fake_cuda_variables

ROOT = Path(__file__).parents[2]
PLUGINS = Path(__file__).with_name("simulated_plugins")


def environment() -> dict[str, str]:
    """Return the variables of a program that shall be such a server."""
    others = [path for path in os.environ.get("PYTHONPATH", "").split(":") if path]
    return fake_cuda_variables(fabric=1) | {
        "PYTHONPATH": ":".join([str(PLUGINS), str(ROOT), *others])
    }


def install() -> None:
    """Make this process's worker a rank with simulated device memory, and let its hosts be several."""
    from gpu_checks.simulated_cuda import SimulatedCudaMemory
    from vllm_dwdp.compat.frontend import ranks
    from vllm_dwdp.device import host

    host.HostDevice = lambda: SimulatedCudaMemory(carries_fds=False)  # type: ignore[assignment,misc]
    ranks.refuse_several_hosts_on_cpu = lambda rendezvous: None
