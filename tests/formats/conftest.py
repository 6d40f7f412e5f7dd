"""vLLM as one process of one rank has it, to build its layers in."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from tests.formats.layers import import_everything
from tests.helpers import cpu_gates
from vllm_dwdp.entrypoints.launch.ports import free_ports


@pytest.fixture(scope="package", autouse=True)
def layers_can_be_built() -> Iterator[None]:
    """Yield a current config, and parallel groups of one process."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small
    import_everything()
    if cpu_gates.why_not() is None:
        cpu_gates.open_gates()
    config = VllmConfig()
    with set_current_vllm_config(config):
        (port,) = free_ports(1)
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, "gloo")
        initialize_model_parallel(1)
        model = SimpleNamespace(hf_config=SimpleNamespace(model_type="qwen3_moe"), is_moe=True)
        object.__setattr__(config, "model_config", model)
        yield
    cleanup_dist_env_and_memory()
    torch.set_num_threads(num_threads)
