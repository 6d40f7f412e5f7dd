"""What the layer replacement needs of vLLM's `RoutedExperts`, small enough to plant faults in."""

from types import SimpleNamespace
from typing import Any

import torch

from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.device.host import HostDevice
from vllm_dwdp.model_executor.expert_shard import ExpertShard
from vllm_dwdp.model_executor.routed_experts import shard_layer_class

NUM_EXPERTS, ROW = 5, 4096
"""Experts of a layer, and the elements (bf16) of one in `w13_weight`: large, and worth pages."""


METHODS = "vllm.model_executor.layers.quantization.stand_in"


class Method:
    """A quantisation method; its `process` may be replaced."""

    __module__ = METHODS  # so that its objects are entered

    def __init_subclass__(cls) -> None:
        cls.__module__ = METHODS

    def __init__(self) -> None:
        self.seen_bytes = -1

    def process_weights_after_loading(self, layer: Any) -> None:
        self.seen_bytes = layer.w13_weight.untyped_storage().nbytes()
        self.process(layer)

    def process(self, layer: Any) -> None:
        """Nothing, by default."""


class Stock(torch.nn.Module):
    """A layer of one large and one small parameter per expert, an alias, and the router's bias."""

    make_method: Any = Method

    def __init__(
        self,
        name: str,
        dtype: torch.dtype,
        config: Any,
        quant_config: Any,
        maps: Any,
        bias: torch.Tensor,
    ) -> None:
        super().__init__()
        self.layer_name = name
        self.global_num_experts = config.num_experts
        self.top_k = 1
        self.quant_method = type(self).make_method()
        experts = torch.empty(config.num_experts, ROW, dtype=dtype)
        self.w13_weight = torch.nn.Parameter(experts, requires_grad=False)
        self.w13_qweight = self.w13_weight
        scales = torch.ones(config.num_experts, 2)
        self.w13_scale = torch.nn.Parameter(scales, requires_grad=False)
        self.bias = bias

    def _ensure_moe_quant_config_init(self) -> None: ...

    def weight_loader(
        self,
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int | None = None,
        return_success: bool = False,
    ) -> bool | None:
        rows = param.data if expert_id is None else param.data[expert_id]
        rows.copy_(loaded_weight)
        return True if return_success else None


def weights(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return the large parameter of all experts, `[NUM_EXPERTS, ROW]`."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(NUM_EXPERTS, ROW, generator=generator).to(dtype)


def scales() -> torch.Tensor:
    """Return the small parameter of all experts."""
    return torch.arange(2.0 * NUM_EXPERTS).view(NUM_EXPERTS, 2)


class Loaded:
    """A layer of rank `rank` of two, built, loaded and processed; `close` gives its shard back."""

    def __init__(
        self, rank: int, method: type = Method, *, adopted: Any = None, fused: bool = False
    ) -> None:
        self.shard = ExpertShard(DwdpConfig(group_size=2), rank, HostDevice(), adopted)
        stock = type("Stock", (Stock,), {"make_method": method})
        config = SimpleNamespace(
            num_experts=NUM_EXPERTS, moe_parallel_config=SimpleNamespace(tp_size=1)
        )
        self.bias = torch.nn.Parameter(torch.ones(NUM_EXPERTS), requires_grad=False)
        self.layer: Any = shard_layer_class(stock, self.shard)(
            "experts", torch.bfloat16, config, None, SimpleNamespace(), self.bias
        )
        self._load(fused)

    def _load(self, fused: bool) -> None:
        layer = self.layer
        if fused:
            layer.weight_loader(layer.w13_weight, weights(), "w13", "w1")
        for expert in range(NUM_EXPERTS):
            if not fused:
                layer.weight_loader(layer.w13_weight, weights()[expert], "w13", "w1", expert)
            layer.weight_loader(layer.w13_scale, scales()[expert], "w13_scale", "w1", expert)

    def process(self) -> "Loaded":
        """As vLLM does after loading."""
        self.layer.quant_method.process_weights_after_loading(self.layer)
        return self

    def close(self) -> None:
        self.shard.close()
