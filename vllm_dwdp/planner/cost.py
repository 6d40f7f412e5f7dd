"""Seconds of one MoE layer under DWDP and under DEP (data-parallel attention, expert parallelism).

The roofline of arXiv 2604.01621, sections 3 and 4.3.1: an operator takes the larger of its operations
and its bytes; a DWDP layer the larger of its compute and the prefetch of the next; a DEP layer its
compute and two all-to-alls.
"""

from dataclasses import dataclass
from math import comb

from vllm_dwdp.planner.hardware import Efficiency, Hardware
from vllm_dwdp.planner.model_shape import ModelShape

DISPATCH_BITS = 4.5
COMBINE_BITS = 16.0


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
    """One MoE layer of one rank, seconds by part."""

    attention_linear: float
    attention_core: float
    routed_experts: float
    shared_experts: float

    @property
    def compute(self) -> float:
        """All of it."""
        return (
            self.attention_linear + self.attention_core + self.routed_experts + self.shared_experts
        )


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """One model on one kind of accelerator, `group_size` ranks sharing the experts.

    Args:
        extra_experts: held beyond an even share, per layer and rank.
    """

    shape: ModelShape
    hardware: Hardware
    efficiency: Efficiency
    group_size: int
    extra_experts: int = 0

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
        """Seconds to fetch a layer's remote experts."""
        return self.remote_bytes / (self.hardware.link_gbps * 1e9 * self.efficiency.link)

    def layer(self, step: Step, num_experts_read: float) -> LayerSeconds:
        """Compute seconds of a layer whose kernel reads at most `num_experts_read` experts."""
        shape, hardware, reached = self.shape, self.hardware, self.efficiency
        bf16 = hardware.flops(16)
        routed_flops = 2 * step.num_tokens * shape.experts_per_token * shape.expert_params
        touched = self.touched_experts(step.num_tokens, num_experts_read)
        kv_bytes = step.num_tokens * step.mean_keys * shape.kv_elements * shape.kv_bits / 8
        return LayerSeconds(
            attention_linear=self._operator(
                2 * step.num_tokens * shape.attention_params,
                bf16 * reached.dense_gemm,
                shape.attention_params * shape.attention_bits / 8,
            ),
            # A prompt's keys are read once for many queries, a decoded token's for itself alone.
            attention_core=self._operator(
                2 * step.num_tokens * step.mean_keys * shape.core_dim,
                bf16 * reached.attention,
                kv_bytes / max(1.0, min(step.num_tokens, 128.0)),
            ),
            routed_experts=self._operator(
                routed_flops,
                hardware.flops(shape.expert_bits) * reached.grouped_gemm,
                touched * shape.expert_bytes,
            ),
            shared_experts=self._operator(
                2 * step.num_tokens * shape.shared_params,
                hardware.flops(shape.expert_bits) * reached.dense_gemm,
                shape.shared_params * shape.expert_bits / 8,
            ),
        )

    def touched_experts(self, num_tokens: float, num_experts: float) -> float:
        """Distinct experts of `num_experts` that uniformly routed tokens need."""
        share = self.shape.experts_per_token / self.shape.num_experts
        return num_experts * (1.0 - float((1.0 - share) ** num_tokens))

    def dwdp_layer(self, step: Step) -> float:
        """Seconds of a DWDP layer in prefetch mode."""
        compute = self.layer(step, self.shape.num_experts).compute
        slowed = compute / self.efficiency.beside_copies if self.remote_bytes else compute
        return max(slowed, self.prefetch)

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
        return LayerSeconds(
            attention_linear=own.attention_linear,
            attention_core=own.attention_core,
            routed_experts=routed,
            shared_experts=own.shared_experts,
        )

    def all_to_all(self, step: Step) -> float:
        """Dispatch in 4-bit blocks and combine in bf16, every copy of a token to another rank."""
        copies = self.shape.experts_per_token * (1 - 1 / self.group_size)
        bits = DISPATCH_BITS + COMBINE_BITS
        num_bytes = step.num_tokens * copies * self.shape.hidden_size * bits / 8
        return num_bytes / (self.hardware.link_gbps * 1e9 * self.efficiency.link)

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
