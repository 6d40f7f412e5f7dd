"""The routed experts of known models as layers of a group, in the pages of a GPU."""

from vllm_dwdp.layout.composite import WeightLayout
from vllm_dwdp.layout.model import LayerLayout, ModelLayout
from vllm_dwdp.layout.placement import Placement

PAGE = 2 * 2**20
R1_HIDDEN, R1_INTERMEDIATE, R1_MOE_LAYERS = 7168, 2048, 58


def layer_of(
    num_experts: int, group_size: int, *, smaller: int = 1, **expert_bytes: int
) -> LayerLayout:
    """Lay out one layer whose tensors have this many bytes an expert.

    Args:
        smaller: by how much bytes and pages are divided; the plan of copies has the same form.
    """
    placement = Placement(num_experts=num_experts, group_size=group_size)
    weights = tuple(
        WeightLayout(
            name=name,
            placement=placement,
            expert_bytes=each // smaller,
            page_bytes=PAGE // smaller,
        )
        for name, each in expert_bytes.items()
    )
    return ModelLayout.plan([("layer", weights)]).layers[0]


def r1_nvfp4(group_size: int, *, smaller: int = 1) -> LayerLayout:
    """DeepSeek-R1 in NVFP4: two numbers a byte, and a byte of scale for sixteen of them."""
    numbers = R1_HIDDEN * R1_INTERMEDIATE
    return layer_of(
        256,
        group_size,
        smaller=smaller,
        w13=2 * numbers // 2,
        w2=numbers // 2,
        w13_scale=2 * numbers // 16,
        w2_scale=numbers // 16,
    )


def r1_fp8(group_size: int) -> LayerLayout:
    """DeepSeek-R1 in block FP8; its scales are too small to be shared page by page."""
    numbers = R1_HIDDEN * R1_INTERMEDIATE
    return layer_of(256, group_size, w13=2 * numbers, w2=numbers)


def qwen3_30b(group_size: int) -> LayerLayout:
    """Qwen3-30B-A3B in bf16."""
    return layer_of(128, group_size, w13=2 * 2 * 2048 * 768, w2=2 * 2048 * 768)
