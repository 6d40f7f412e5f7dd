"""Which model vLLM has built and what it keeps of a sequence in each layer; for `report`."""

import dataclasses
import math
import sys
from typing import Any


def report(worker: Any) -> dict[str, Any]:
    """Return what each layer keeps: bytes per token, a window, or a state's elements.

    `classes` are the model's, with those that it is derived from, by all names that the registry has.
    """
    return {
        "classes": names_of(type(worker.model_runner.get_model())),
        "kv_layers": {name: describe(spec) for name, spec in worker.get_kv_cache_spec().items()},
    }


def names_of(model: type) -> list[str]:
    """List a model's classes; where the registry has a class by another name, by that one too."""
    from vllm.model_executor.models import ModelRegistry

    classes = model.__mro__
    registered = [
        entry.class_name
        for entry in ModelRegistry.models.values()
        if getattr(sys.modules.get(entry.module_name), entry.class_name, None) in classes
    ]
    return list(dict.fromkeys([each.__name__ for each in classes] + registered))


def describe(spec: Any) -> dict[str, float]:
    """One layer's specification, without padding, which depends on the other layers."""
    from vllm.v1.kv_cache_interface import CircularBufferSpec, MambaSpec

    if isinstance(spec, MambaSpec):
        sizes = [math.prod(shape) for shape in spec.shapes]
        convolution = 0 if spec.mamba_type.name == "LINEAR" else sizes[0]
        return {"convolution": convolution, "recurrent": sum(sizes) - convolution}
    window = getattr(spec, "sliding_window", None) or getattr(spec, "attention_chunk_size", None)
    if isinstance(spec, CircularBufferSpec):
        window = spec.block_size
    # A worker that runs has blocks that may be smaller than an entry for many tokens.
    block = spec.block_size * max(1, getattr(spec, "tokens_per_state", 1))
    whole = dataclasses.replace(spec, block_size=block)
    return {"token_bytes": whole.real_page_size_bytes / block, "window": window or 0}
