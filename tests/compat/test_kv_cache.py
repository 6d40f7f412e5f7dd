"""What the planner says that a layer keeps, against vLLM's own sizes, for models as they are published.

No engine runs: `tests/e2e/test_models.py` compares small models, layer by layer, in one that does.
"""

import inspect
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.unit.planner.test_indexers import INDEXED
from tests.unit.planner.test_kv_cache import KIMI_LINEAR, NEMOTRON_H, QWEN3_NEXT
from vllm_dwdp.paper import DEEPSEEK_R1
from vllm_dwdp.planner.checkpoint import ConfigFields
from vllm_dwdp.planner.model_shape import shape_of
from vllm_dwdp.planner.states import FLOAT32, HALF, LayerState, layer_state

pytestmark = pytest.mark.compat

JAMBA = {
    "hidden_size": 4096,
    "mamba_d_conv": 4,
    "mamba_d_state": 16,
    "mamba_dt_rank": 256,
    "mamba_expand": 2,
}
GRANITE_4 = {
    "hidden_size": 4096,
    "mamba_d_conv": 4,
    "mamba_d_head": 64,
    "mamba_d_state": 128,
    "mamba_n_groups": 1,
    "mamba_n_heads": 128,
}
LFM2 = {"hidden_size": 2048, "conv_L_cache": 3}
BITS = {torch.bfloat16: HALF, torch.float32: FLOAT32}


def elements(shapes: Any) -> tuple[int, int]:
    """Elements of the convolution and of the recurrent part."""
    convolution, *recurrent = (math.prod(shape) for shape in shapes)
    return convolution, sum(recurrent)


def sizes(state: LayerState) -> tuple[int, int]:
    return state.convolution, state.recurrent


@pytest.mark.parametrize(
    ("config", "name", "arguments"),
    [
        pytest.param(
            QWEN3_NEXT,
            "gated_delta_net_state_shape",
            {
                "num_k_heads": 16,
                "num_v_heads": 32,
                "head_k_dim": 128,
                "head_v_dim": 128,
                "conv_kernel_size": 4,
            },
            id="Qwen3-Next",
        ),
        pytest.param(
            KIMI_LINEAR, "kda_state_shape", {"num_heads": 32, "head_dim": 128}, id="Kimi-Linear"
        ),
        pytest.param(
            NEMOTRON_H,
            "mamba2_state_shape",
            {
                "intermediate_size": 256,
                "n_groups": 1,
                "num_heads": 8,
                "head_dim": 32,
                "state_size": 32,
                "conv_kernel": 4,
            },
            id="Nemotron",
        ),
        pytest.param(
            GRANITE_4,
            "mamba2_state_shape",
            {
                "intermediate_size": 8192,
                "n_groups": 1,
                "num_heads": 128,
                "head_dim": 64,
                "state_size": 128,
                "conv_kernel": 4,
            },
            id="Granite-4",
        ),
        pytest.param(
            JAMBA,
            "mamba1_state_shape",
            {"intermediate_size": 8192, "state_size": 16, "conv_kernel": 4},
            id="Jamba",
        ),
        pytest.param(
            LFM2, "short_conv_state_shape", {"intermediate_size": 2048, "conv_kernel": 3}, id="LFM2"
        ),
    ],
)
def test_the_elements_of_a_state(
    config: dict[str, Any], name: str, arguments: dict[str, int]
) -> None:
    from vllm.model_executor.layers.mamba.mamba_utils import MambaStateShapeCalculator

    shapes = getattr(MambaStateShapeCalculator, name)(tp_world_size=1, **arguments)
    assert sizes(layer_state(ConfigFields(config))) == elements(shapes)


def test_the_types_of_a_state() -> None:
    """As on a GPU with the default of `--mamba-ssm-cache-dtype`; CPUs keep float32 whatever it says."""
    from vllm.model_executor.layers.mamba.mamba_utils import MambaStateDtypeCalculator
    from vllm.model_executor.models.config import NemotronHForCausalLMConfig

    types = MambaStateDtypeCalculator
    expected = {
        "gated_delta_net": types.gated_delta_net_state_dtype(torch.bfloat16, "auto", "auto"),
        "kda": types.kda_state_dtype(torch.bfloat16, "auto", "auto"),
        "mamba2": types.mamba2_state_dtype(torch.bfloat16, "auto", "auto"),
    }
    found = {"gated_delta_net": QWEN3_NEXT, "kda": KIMI_LINEAR, "mamba2": GRANITE_4}
    for name, config in found.items():
        convolution, recurrent = expected[name]
        assert BITS[convolution] == HALF
        assert layer_state(ConfigFields(config)).recurrent_bits == BITS[recurrent], name
    assert NemotronHForCausalLMConfig.DEFAULT_MAMBA_SSM_CACHE_DTYPE == "float32"
    assert layer_state(ConfigFields(NEMOTRON_H)).recurrent_bits == FLOAT32


def test_the_keys_of_a_sparse_indexer() -> None:
    """Stock vLLM has no sparse attention on CPUs: its cache is asked without the model."""
    from vllm.model_executor.models.deepseek_v2 import DeepseekV32IndexerCache, Indexer

    source = inspect.getsource(Indexer.__init__)
    assert "head_dim=self.head_dim + self.head_dim // self.quant_block_size * 4" in source
    assert "self.quant_block_size = 128" in source
    layer = SimpleNamespace(
        cache_config=SimpleNamespace(block_size=64), head_dim=128 + 4, dtype=torch.uint8
    )
    spec = DeepseekV32IndexerCache.get_kv_cache_spec(layer, None)
    added = shape_of(DEEPSEEK_R1 | INDEXED).kv_cache.token_bytes - (
        shape_of(DEEPSEEK_R1).kv_cache.token_bytes
    )
    assert added == 61 * spec.real_page_size_bytes / spec.block_size


def test_a_latent_of_a_token() -> None:
    from vllm.v1.kv_cache_interface import MLAAttentionSpec

    spec = MLAAttentionSpec(block_size=64, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)
    cache = shape_of(DEEPSEEK_R1).kv_cache
    assert cache.token_bytes == 61 * spec.real_page_size_bytes / spec.block_size
