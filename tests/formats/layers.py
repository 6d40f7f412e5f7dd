"""Stock MoE layers of a few experts, built and processed by vLLM itself, for a kernel of choice."""

import contextlib
import hashlib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any
from unittest import mock

import torch

from tests.formats.methods import METHODS
from tests.formats.operations import replaced_everywhere

NUM_EXPERTS = 7
HIDDEN = INTERMEDIATE = 256
ORACLES = (
    "fp8",
    "int8",
    "int_wna16",
    "mxfp4",
    "mxfp8",
    "nvfp4",
    "unquantized",
    "w4a8",
    "w4a8_int8",
)
LAYERS = "vllm.model_executor.layers"


def import_everything() -> None:
    """Import all of vLLM's MoE layers, so that their classes are known and replaced functions found."""
    for name in ("quantization", "fused_moe"):
        package = importlib.import_module(f"{LAYERS}.{name}")
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            with contextlib.suppress(Exception):  # packages for other hardware are not installed
                importlib.import_module(module.name)


def oracle_modules() -> dict[str, Any]:
    return {name: importlib.import_module(f"{LAYERS}.fused_moe.oracle.{name}") for name in ORACLES}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A backend of an oracle with one of its kernels; without one, a method chooses by itself."""

    oracle: str
    backend: Enum
    experts: Any


def select_functions() -> dict[str, str]:
    """Return the oracle by "module:name" of the function with which a method asks it for a backend."""
    return {
        f"{module.__name__}:{name}": oracle
        for oracle, module in oracle_modules().items()
        for name, function in vars(module).items()
        if name.startswith("select_") and getattr(function, "__module__", "") == module.__name__
    }


class Asked(Exception):
    """What a method wants of an oracle; it is stopped there."""


def asked(method: str) -> tuple[str, Any, Any] | None:
    """Return the oracle that a method asks, with weights and activations; None if it asks none."""

    def ask(oracle: str) -> Callable[..., Any]:
        def select(
            config: Any = None, weight_key: Any = None, activation_key: Any = None, **_: Any
        ) -> Any:
            raise Asked(oracle, weight_key, activation_key)

        return select

    asking = {place: ask(oracle) for place, oracle in select_functions().items()}
    with replaced_everywhere(asking):
        try:
            make_layer(method)
        except Asked as answer:
            return answer.args  # type: ignore[return-value]
    return None


@contextlib.contextmanager
def choosing(choice: Choice) -> Iterator[None]:
    """While active, the oracle answers with `choice`, and kernels find their devices here."""
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExperts

    def select(*_: Any, **__: Any) -> tuple[Enum, type]:
        return choice.backend, choice.experts

    selecting = {
        place: select for place, oracle in select_functions().items() if oracle == choice.oracle
    }
    if choice.experts is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced_everywhere(selecting))
        for kernel in subclasses(FusedMoEExperts):
            here = {"_supports_current_device": staticmethod(lambda: True)}
            stack.enter_context(mock.patch.multiple(kernel, **here))
        yield


def subclasses(kind: type) -> set[Any]:
    """Classes that inherit from one, at any distance."""
    found = set(kind.__subclasses__())
    return found.union(*(subclasses(each) for each in found))


def make_layer(method: str) -> Any:
    """Build vLLM's layer for a key of `METHODS`."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEConfig,
        FusedMoEParallelConfig,
        RoutingMethodType,
    )
    from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    parallel = FusedMoEParallelConfig.make_no_parallel()
    is_gpt_oss = "gpt_oss" in method
    config = FusedMoEConfig(
        num_experts=NUM_EXPERTS,
        num_local_experts=NUM_EXPERTS,
        num_logical_experts=NUM_EXPERTS,
        experts_per_token=2,
        hidden_dim=HIDDEN,
        intermediate_size=INTERMEDIATE,
        activation=MoEActivation.SWIGLUOAI if is_gpt_oss else MoEActivation.SILU,
        has_bias=is_gpt_oss,
        device="cpu",
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=parallel,
        in_dtype=torch.bfloat16,
    )
    maps = ExpertMapManager(
        max_num_batched_tokens=64,
        top_k=2,
        global_num_experts=NUM_EXPERTS,
        num_redundant_experts=0,
        num_expert_group=None,
        moe_parallel_config=parallel,
        placement_strategy="linear",
        enable_eplb=False,
    )
    return RoutedExperts(
        "model.layers.0.mlp.experts", torch.bfloat16, config, quant_config(method), maps
    )


def quant_config(method: str) -> Any:
    from vllm.model_executor.layers.quantization import get_quantization_config

    described = METHODS[method]
    if described is None:
        return None
    name, config = described
    return get_quantization_config(name).from_config(config)


def fill(layer: Any, seed: int = 0) -> None:
    """Give every raw parameter valid values, the same in every layer of the same kind.

    Each expert's are twice as large as its neighbour's: a reduction over experts finds only the last.
    """
    for name, parameter in layer.named_parameters():
        digest = hashlib.sha256(f"{name}{seed}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
        parameter.data.copy_(_values(name, parameter.data, generator).to(parameter.dtype))


def _values(name: str, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    def integers(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, like.shape, generator=generator)

    if name.endswith("weight_shape"):
        return torch.tensor([HIDDEN, INTERMEDIATE]).expand(like.shape)
    if "g_idx" in name:
        return (torch.arange(like.shape[-1]) // 128).expand(like.shape)
    expert = torch.arange(like.shape[0]).view(-1, *[1] * (like.dim() - 1))
    if like.dtype == torch.uint8:
        return integers(110, 114) + 2 * expert if "scale" in name else integers(0, 256)
    if like.dtype == torch.int8:
        return integers(-127, 128)
    if like.dtype == torch.int32:
        return integers(-(2**31), 2**31)
    numbers = torch.randn(like.shape, generator=generator) * torch.exp2(expert - 4.0)
    return numbers.abs() + 0.01 if "scale" in name else numbers
