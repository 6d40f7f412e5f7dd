"""Seconds of one MoE layer under DWDP and under DEP (data-parallel attention, expert parallelism).

The roofline of arXiv 2604.01621, sections 3 and 4.3.1: an operator takes the larger of its operations
and its bytes; a DWDP layer the larger of its compute and the prefetch of the next; a DEP layer its
compute and an exchange of tokens before and after the experts. While copies flow, compute beside them
is slower, so `T_DWDP = max(T_prefetch, T_compute + (1 - beside_copies) * T_prefetch)`.
"""

from dataclasses import dataclass, replace
from enum import StrEnum
from math import comb

from vllm_dwdp.planner.hardware import Efficiency, Hardware
from vllm_dwdp.planner.model_shape import ModelShape

DISPATCH_BITS = 4.5
COMBINE_BITS = 16.0
OTHER_BYTES = 2


class Exchange(StrEnum):
    """How DEP brings tokens to experts and back."""

    PER_EXPERT = "one copy per routed expert"
    PER_RANK = "one copy per rank that holds a routed expert"
    ALL_GATHER = "every token to every rank, in 16 bits"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One forward step of a rank: `num_tokens` new tokens, each attending to `mean_keys` keys."""

    num_tokens: float
    mean_keys: float

    @classmethod
    def prefill(cls, num_tokens: float, input_tokens: float) -> "Step":
        """Whole prompts of `input_tokens`, causal: a token sees half of its prompt on average."""
        return cls(num_tokens=num_tokens, mean_keys=min(input_tokens, num_tokens) / 2)

    @classmethod
    def decode(cls, batch_size: float, context_tokens: float) -> "Step":
        """One new token of each of `batch_size` sequences."""
        return cls(num_tokens=batch_size, mean_keys=context_tokens)


@dataclass(frozen=True, kw_only=True)
class LayerSeconds:
    """One layer of one rank, or all of them, seconds by part.

    Args:
        linear: dense matrix products: projections, shared experts, dense feed-forwards.
        attention: the products of queries, keys and values.
        experts: the grouped products of the routed experts.
        other: everything else, bound by memory.
    """

    linear: float
    attention: float
    experts: float
    other: float

    @property
    def before_experts(self) -> float:
        """What a rank does for its own tokens only."""
        return self.linear + self.attention + self.other

    @property
    def compute(self) -> float:
        """All of it."""
        return self.before_experts + self.experts

    def times(self, number: float) -> "LayerSeconds":
        """That many layers."""
        return LayerSeconds(
            linear=number * self.linear,
            attention=number * self.attention,
            experts=number * self.experts,
            other=number * self.other,
        )

    def plus(self, more: "LayerSeconds") -> "LayerSeconds":
        """Both, one after the other."""
        return LayerSeconds(
            linear=self.linear + more.linear,
            attention=self.attention + more.attention,
            experts=self.experts + more.experts,
            other=self.other + more.other,
        )


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """One model on one kind of accelerator, `group_size` ranks sharing the experts.

    Args:
        extra_experts: held beyond an even share, per layer and rank.
        exchange: of DEP.
    """

    shape: ModelShape
    hardware: Hardware
    efficiency: Efficiency
    group_size: int
    extra_experts: int = 0
    exchange: Exchange = Exchange.PER_RANK

    @property
    def resident_experts(self) -> int:
        """Per layer and rank."""
        even = -(-self.shape.num_experts // self.group_size)
        return min(self.shape.num_experts, even + self.extra_experts)

    @property
    def remote_bytes(self) -> float:
        """Fetched per layer."""
        return (self.shape.num_experts - self.resident_experts) * self.shape.expert_bytes

    @property
    def prefetch(self) -> float:
        """Seconds to fetch a layer's remote experts from sources that serve nobody else."""
        return self.remote_bytes / self.link_bytes_per_s

    @property
    def link_bytes_per_s(self) -> float:
        """Of the copy engines, one direction."""
        return self.hardware.link_gbps * 1e9 * self.efficiency.link

    @property
    def interference(self) -> float:
        """Seconds that the copies of a layer add to the compute beside them."""
        return (1.0 - self.efficiency.beside_copies) * self.prefetch

    def layer(self, step: Step, num_experts_read: float) -> LayerSeconds:
        """Compute seconds of an MoE layer whose kernel reads at most `num_experts_read` experts."""
        shape, reached = self.shape, self.efficiency
        routed_flops = 2 * step.num_tokens * shape.experts_per_token * shape.expert_params
        touched = self.touched_experts(step.num_tokens, num_experts_read)
        outside = self._outside_experts(step)
        shared = self._linear(step, shape.shared_params, shape.shared_bits)
        experts = self._operator(
            routed_flops,
            self.hardware.flops(shape.expert_bits) * reached.grouped_gemm,
            touched * shape.expert_bytes,
        )
        return replace(outside, linear=outside.linear + shared, experts=experts)

    def dense_layers(self, step: Step) -> LayerSeconds:
        """Compute seconds of all layers without routed experts."""
        outside = self._outside_experts(step)
        feed_forward = self._linear(step, self.shape.dense_mlp_params, self.shape.dense_mlp_bits)
        return replace(outside, linear=outside.linear + feed_forward).times(
            self.shape.num_layers - self.shape.num_moe_layers
        )

    def step_seconds(self, step: Step) -> LayerSeconds:
        """Compute seconds of a step, all experts at hand, nothing beside it."""
        moe = self.layer(step, self.shape.num_experts).times(self.shape.num_moe_layers)
        return moe.plus(self.dense_layers(step))

    def touched_experts(self, num_tokens: float, num_experts: float) -> float:
        """Distinct experts of `num_experts` that uniformly routed tokens need."""
        share = self.shape.experts_per_token / self.shape.num_experts
        return num_experts * (1.0 - float((1.0 - share) ** num_tokens))

    def dwdp_layer(self, step: Step) -> float:
        """Seconds of a DWDP layer in prefetch mode, no contention at the sources."""
        compute = self.layer(step, self.shape.num_experts).compute
        return max(self.prefetch, compute + self.interference)

    def dep_layer(self, step: Step) -> float:
        """Seconds of a balanced DEP layer: own attention, a share of everybody's routed tokens."""
        return self.dep_compute(step).compute + self.all_to_all(step)

    def dep_compute(self, step: Step) -> LayerSeconds:
        """Its compute: the tokens of all ranks meet `num_experts / group_size` experts."""
        own = self.layer(step, self.shape.num_experts)
        local = self.shape.num_experts / self.group_size
        touched = self.touched_experts(step.num_tokens * self.group_size, local)
        routed = self._operator(
            2 * step.num_tokens * self.shape.experts_per_token * self.shape.expert_params,
            self.hardware.flops(self.shape.expert_bits) * self.efficiency.grouped_gemm,
            touched * self.shape.expert_bytes,
        )
        return replace(own, experts=routed)

    def all_to_all(self, step: Step) -> float:
        """Seconds of dispatch (4-bit blocks) and combine (16 bits), or of gathering everything."""
        others = self.group_size - 1
        hidden = step.num_tokens * self.shape.hidden_size / 8
        if self.exchange is Exchange.ALL_GATHER:
            return 2 * others * hidden * COMBINE_BITS / self.link_bytes_per_s
        chosen = self.shape.experts_per_token
        if self.exchange is Exchange.PER_EXPERT:
            copies = chosen * others / self.group_size
        else:
            copies = others * (1.0 - (1.0 - 1.0 / self.group_size) ** chosen)
        return copies * hidden * (DISPATCH_BITS + COMBINE_BITS) / self.link_bytes_per_s

    def _outside_experts(self, step: Step) -> LayerSeconds:
        """Attention and the memory-bound rest of any layer."""
        shape = self.shape
        keys = step.mean_keys * (1.0 - shape.sliding_share)
        keys += min(step.mean_keys, shape.sliding_window) * shape.sliding_share
        # A prompt's keys are read once for many queries, a decoded token's for itself alone.
        kv_bytes = step.num_tokens * keys * shape.kv_elements * shape.kv_bits / 8
        attention = self._operator(
            2 * step.num_tokens * keys * shape.core_dim,
            self.hardware.flops(16) * self.efficiency.attention,
            kv_bytes / max(1.0, min(step.num_tokens, 128.0)),
        )
        other_bytes = (
            self.efficiency.other_passes * step.num_tokens * shape.hidden_size * OTHER_BYTES
        )
        return LayerSeconds(
            linear=self._linear(step, shape.attention_params, shape.attention_bits),
            attention=attention,
            experts=0.0,
            other=other_bytes / (self.hardware.memory_gbps * 1e9),
        )

    def _linear(self, step: Step, num_params: int, bits: float) -> float:
        return self._operator(
            2 * step.num_tokens * num_params,
            self.hardware.flops(bits) * self.efficiency.dense_gemm,
            num_params * bits / 8,
        )

    def _operator(self, flops: float, flops_per_s: float, num_bytes: float) -> float:
        memory = self.hardware.memory_gbps * 1e9 * self.efficiency.memory
        return max(flops / flops_per_s, num_bytes / memory)


def contention(group_size: int) -> list[float]:
    """Pr[C = c], c = 1, 2, ...: pulls that meet at one source when every rank picks a peer at random.

    Source: arXiv 2604.01621, section 4.3.1: C - 1 ~ Binomial(N - 2, 1 / (N - 1)).
    """
    trials, chance = group_size - 2, 1 / (group_size - 1)
    return [
        comb(trials, others) * chance**others * (1 - chance) ** (trials - others)
        for others in range(trials + 1)
    ]
