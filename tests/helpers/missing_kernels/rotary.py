"""Positions."""

from typing import Any


def the_rotary_embedding() -> None:
    """Call ERNIE-4.5-VL's rotary embedding on CPUs as it is called on GPUs: that is plain torch."""
    from vllm.model_executor.layers.rotary_embedding import ernie45_vl_rope

    embedding: Any = ernie45_vl_rope.Ernie4_5_VLRotaryEmbedding
    embedding.forward_cpu = embedding.forward_cuda
