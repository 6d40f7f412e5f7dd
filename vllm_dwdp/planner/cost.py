"""Seconds of one MoE layer under DWDP and under DEP (data-parallel attention, expert parallelism).

The roofline of arXiv 2604.01621, sections 3 and 4.3.1: an operator takes the larger of its operations
and its bytes; a DWDP layer the larger of its compute and the prefetch of the next; a DEP layer its
compute and an exchange of tokens before and after the experts. While copies flow, compute beside them
is slower, so `T_DWDP = max(T_prefetch, T_compute + (1 - beside_copies) * T_prefetch)`. Layers without
experts compute too while the copies of the next ones flow (`model_shape.dense_beside`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from vllm_dwdp.planner.adapters import NO_SLOTS, Slots
from vllm_dwdp.planner.hardware import Efficiency, Hardware
from vllm_dwdp.planner.model_shape import ModelShape
from vllm_dwdp.planner.quantisation import Precision
from vllm_dwdp.planner.step import LayerSeconds, Step

DISPATCH_BITS: Mapping[int, float] = {4: 4.5, 8: 8.0, 16: 16.0}
"""Sent per hidden element to an expert whose products run in so many bits; an assumption."""


COMBINE_BITS = 16.0
"""Sent back, likewise."""


OTHER_BYTES = 2


class Exchange(StrEnum):
    """How DEP brings tokens to experts and back."""

    PER_EXPERT = "one copy per routed expert"
    PER_RANK = "one copy per rank that holds a routed expert"
    ALL_GATHER = "every token to every rank, in 16 bits"


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """One model on one kind of accelerator, `group_size` ranks sharing the experts.

    Args:
        extra_experts: held beyond an even share, per layer and rank.
        exchange: of DEP.
        adapters: slots for LoRA adapters.
    """

    shape: ModelShape
    hardware: Hardware
    efficiency: Efficiency
    group_size: int
    extra_experts: int = 0
    exchange: Exchange = Exchange.PER_RANK
    adapters: Slots = NO_SLOTS

    @cached_property
    def resident_experts(self) -> int:
        """The experts held per layer on each rank."""
        even = -(-self.shape.num_experts // self.group_size)
        return min(self.shape.num_experts, even + self.extra_experts)

    @cached_property
    def remote_bytes(self) -> float:
        """The bytes that a rank fetches per layer."""
        return self.remote_experts * self.shape.layer_expert_bytes

    @cached_property
    def slot_bytes(self) -> float:
        """The bytes of a slot, which has room for the remote experts of any layer."""
        return self.remote_experts * self.shape.largest_expert_bytes

    @property
    def remote_experts(self) -> int:
        """The experts per layer that other ranks hold."""
        return self.shape.num_experts - self.resident_experts

    @property
    def adapter_bytes(self) -> float:
        """The bytes of all slots for LoRA adapters."""
        return self.shape.adapters.slot_bytes(self.adapters, self.hardware.num_gpus)

    @cached_property
    def prefetch(self) -> float:
        """The seconds to fetch a layer's remote experts from sources that serve no other rank."""
        return self.remote_bytes / self.link_bytes_per_s

    @property
    def link_bytes_per_s(self) -> float:
        """The speed of the copy engines in one direction."""
        return self.hardware.link_gbps * 1e9 * self.efficiency.link

    @property
    def interference(self) -> float:
        """The seconds that the copies of a layer add to the compute beside them."""
        return (1.0 - self.efficiency.beside_copies) * self.prefetch

    @cached_property
    def dispatch_bits(self) -> float:
        """The mean bits sent per hidden element to an expert, in its activations' formats."""
        return sum(
            share * DISPATCH_BITS[self.hardware.product_bits(form)]
            for form, share in self.shape.expert_precision.parts
        )

    def layer(self, step: Step, num_experts_read: float) -> LayerSeconds:
        """Time the compute of an MoE layer whose kernel reads at most `num_experts_read` experts."""
        return self._with_experts(step, self._outside_experts(step), num_experts_read)

    def _with_experts(self, step: Step, outside: LayerSeconds, read: float) -> LayerSeconds:
        shared = self._linear(step, self.shape.shared_params, self.shape.shared_precision)
        routed = self._routed(step, self.touched_experts(step.num_tokens, read))
        return outside.and_feed_forward(linear=shared, experts=routed)

    def dense_layer(self, step: Step) -> LayerSeconds:
        """Time the compute of a layer without routed experts."""
        return self._without_experts(step, self._outside_experts(step))

    def _without_experts(self, step: Step, outside: LayerSeconds) -> LayerSeconds:
        shape = self.shape
        feed_forward = self._linear(step, shape.dense_mlp_params, shape.dense_mlp_precision)
        return outside.and_feed_forward(linear=feed_forward, experts=0.0)

    def dense_layers(self, step: Step) -> LayerSeconds:
        """Time the compute of all layers without routed experts."""
        return self.dense_layer(step).times(self.shape.num_layers - self.shape.num_moe_layers)

    def step_seconds(self, step: Step) -> LayerSeconds:
        """Time the compute of a step, all experts at hand, nothing beside it."""
        moe = self.layer(step, self.shape.num_experts).times(self.shape.num_moe_layers)
        return moe.plus(self.dense_layers(step))

    def touched_experts(self, num_tokens: float, num_experts: float) -> float:
        """Return the distinct experts of `num_experts` that uniformly routed tokens need."""
        share = self.shape.experts_per_token / self.shape.num_experts
        return num_experts * (1.0 - float((1.0 - share) ** num_tokens))

    def dwdp_layer(self, step: Step) -> float:
        """Time a DWDP layer in prefetch mode, no contention at the sources."""
        compute = self.layer(step, self.shape.num_experts).compute
        return self.uncontended(compute + self.interference)

    def uncontended(self, compute: float) -> float:
        """Time a layer of that compute whose copy comes from sources that serve no other rank."""
        return max(self.prefetch, compute)

    def dwdp_step(self, step: Step, layer_seconds: Callable[[float], float] | None = None) -> float:
        """Time a DWDP step in prefetch mode.

        Args:
            layer_seconds: of an MoE layer and the dense layers beside its copy, by their compute; None
                for `uncontended`.
        """
        seconds, outside = layer_seconds or self.uncontended, self._outside_experts(step)
        compute = self._with_experts(step, outside, self.shape.num_experts).compute
        compute += self.interference
        dense = self._without_experts(step, outside).compute
        return sum(
            count * seconds(compute + beside * dense) for beside, count in self.shape.dense_beside
        )

    def dep_step(self, step: Step) -> float:
        """Time a balanced DEP step."""
        return self.shape.num_moe_layers * self.dep_layer(step) + self.dense_layers(step).compute

    def dep_layer(self, step: Step) -> float:
        """Time a balanced DEP layer: own attention, a share of all ranks' routed tokens."""
        return self.dep_compute(step).compute + self.all_to_all(step)

    def dep_compute(self, step: Step) -> LayerSeconds:
        """Time its compute: the tokens of all ranks meet `num_experts / group_size` experts."""
        own = self.layer(step, self.shape.num_experts)
        local = self.shape.num_experts / self.group_size
        touched = self.touched_experts(step.num_tokens * self.group_size, local)
        return own._replace(experts=self._routed(step, touched))

    def all_to_all(self, step: Step) -> float:
        """Time dispatch and combine, or of gathering everything."""
        others = self.group_size - 1
        hidden = step.num_tokens * self.shape.hidden_size / 8
        if self.exchange is Exchange.ALL_GATHER:
            return 2 * others * hidden * COMBINE_BITS / self.link_bytes_per_s
        chosen = self.shape.experts_per_token
        if self.exchange is Exchange.PER_EXPERT:
            copies = chosen * others / self.group_size
        else:
            copies = others * (1.0 - (1.0 - 1.0 / self.group_size) ** chosen)
        return copies * hidden * (self.dispatch_bits + COMBINE_BITS) / self.link_bytes_per_s

    def _outside_experts(self, step: Step) -> LayerSeconds:
        """Time attention and the memory-bound rest of any layer."""
        shape = self.shape
        keys = shape.kv_cache.keys_seen(step.mean_keys)
        readings = step.num_tokens / max(1.0, min(step.num_tokens, step.tokens_per_reading))
        attention = self._operator(
            2 * step.num_tokens * keys * shape.core_dim,
            self.hardware.flops(16) * self.efficiency.attention,
            readings * shape.kv_cache.read_bytes(step.mean_keys),
        )
        attention += sum(
            self._operator(
                step.num_tokens * scoring.operations,
                self.hardware.flops(bits) * self.efficiency.attention,
                readings * scoring.num_bytes,
            )
            for bits, scoring in shape.kv_cache.scoring(step.mean_keys).items()
        )
        other_bytes = (
            self.efficiency.other_passes * step.num_tokens * shape.hidden_size * OTHER_BYTES
        )
        return LayerSeconds(
            linear=self._linear(step, shape.attention_params, shape.attention_precision),
            attention=attention,
            experts=0.0,
            other=other_bytes / (self.hardware.memory_gbps * 1e9),
        )

    def _routed(self, step: Step, touched: float) -> float:
        """Time the products of a rank's routed tokens, `touched` experts read."""
        shape = self.shape
        flops = 2 * step.num_tokens * shape.experts_per_token * shape.expert_params
        return self._products(
            flops,
            touched * shape.expert_params,
            shape.expert_precision,
            self.efficiency.grouped_gemm,
        )

    def _linear(self, step: Step, num_params: int, precision: Precision) -> float:
        flops = 2 * step.num_tokens * num_params
        return self._products(flops, num_params, precision, self.efficiency.dense_gemm)

    def _products(
        self, flops: float, params_read: float, precision: Precision, reached: float
    ) -> float:
        """Time matrix products, in the mean over the layers and their formats."""
        seconds = 0.0
        for form, share in precision.parts:
            peak = self.hardware.flops(self.hardware.product_bits(form))
            bytes_read = params_read * form.bits / 8
            seconds += share * self._operator(flops, peak * reached, bytes_read)
        return seconds

    def _operator(self, flops: float, flops_per_s: float, num_bytes: float) -> float:
        memory = self.hardware.memory_gbps * 1e9 * self.efficiency.memory
        return max(flops / flops_per_s, num_bytes / memory)
