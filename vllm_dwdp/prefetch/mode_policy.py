"""Direct or prefetch: chosen for each forward of the model, by the tokens that it computes. Pure.

Direct reads only the remote experts that the step's tokens are routed to, but at the speed of remote
reads and inside the kernels; prefetch copies all of them, faster and beside the kernels. So direct
wins for steps of few tokens. With `E` experts of which `R` are remote, `k` per token and `b` tokens:

::

    distinct remote experts   D(b) = R * (1 - (1 - k / E) ** b)
    direct, per layer         D(b) * expert_bytes / direct_speed + other
    prefetch, per layer       max(R * expert_bytes / copy_speed, other + resident reads)

Source: the roofline of arXiv 2604.01621, section 3, applied to both modes. On the host device both
speeds are that of the same memory and the copy costs the cores that compute, so direct always wins.
"""

import math
from dataclasses import dataclass
from enum import StrEnum


class Mode(StrEnum):
    """How a forward obtains remote experts."""

    DIRECT = "direct"
    PREFETCH = "prefetch"


@dataclass(frozen=True, kw_only=True)
class LayerCosts:
    """What one MoE layer costs on one rank.

    Args:
        num_experts: routed experts of the layer.
        num_remote_experts: of these, not resident.
        experts_per_token: chosen by the router for each token.
        expert_bytes: bytes of one expert, all its parameters.
        copy_bytes_per_s: measured speed of copies from peers.
        direct_bytes_per_s: measured speed of kernels that read peers in place.
        other_seconds: attention and everything else of a layer during which copies run; of a small
            step, where it hardly depends on the tokens.
    """

    num_experts: int
    num_remote_experts: int
    experts_per_token: int
    expert_bytes: int
    copy_bytes_per_s: float
    direct_bytes_per_s: float
    other_seconds: float

    def expected_remote_experts(self, num_tokens: int) -> float:
        """Distinct remote experts that `num_tokens` tokens need, routing uniform and independent."""
        missed = (1.0 - self.experts_per_token / self.num_experts) ** num_tokens
        return self.num_remote_experts * (1.0 - missed)

    def direct_seconds(self, num_tokens: int) -> float:
        """Seconds of a layer that reads its remote experts in place."""
        read_bytes = self.expected_remote_experts(num_tokens) * self.expert_bytes
        return self.other_seconds + read_bytes / self.direct_bytes_per_s

    @property
    def prefetch_seconds(self) -> float:
        """Seconds of a layer whose remote experts are copied while the layer before it runs."""
        copy = self.num_remote_experts * self.expert_bytes / self.copy_bytes_per_s
        return max(copy, self.other_seconds)

    @property
    def direct_max_tokens(self) -> float:
        """The largest step for which direct is at least as fast: 0 if none is, `inf` if all are."""
        slack = self.prefetch_seconds - self.other_seconds
        read_bytes = slack * self.direct_bytes_per_s
        share = read_bytes / (self.num_remote_experts * self.expert_bytes)
        if share >= 1.0:
            return math.inf
        if self.experts_per_token >= self.num_experts:
            return 0
        per_token = math.log1p(-self.experts_per_token / self.num_experts)
        return int(math.log1p(-share) / per_token)


@dataclass(frozen=True, kw_only=True)
class ModePolicy:
    """The decision of one rank.

    Args:
        direct_max_tokens: forwards of at most this many tokens read in place; `inf`: all, `-inf`: none.
        reason: one phrase for the log and the status.
    """

    direct_max_tokens: float
    reason: str

    @classmethod
    def forced(cls, mode: Mode) -> "ModePolicy":
        """Always `mode`, because the user said so."""
        limit = math.inf if mode is Mode.DIRECT else -math.inf
        return cls(direct_max_tokens=limit, reason=f"mode {mode.value!r} was asked for")

    @classmethod
    def direct_only(cls, *, shares_compute: bool) -> "ModePolicy":
        """`auto` where copies cannot win: on the host device, or if there is nothing to copy."""
        reason = "this rank's memory holds all experts"
        if shares_compute:
            reason = "on the host, copies would share the computing cores and their memory"
        return cls(direct_max_tokens=math.inf, reason=reason)

    @classmethod
    def prefetch_only(cls) -> "ModePolicy":
        """`auto` where the device cannot map peers' experts in place."""
        reason = "this device maps no peers' experts in place"
        return cls(direct_max_tokens=-math.inf, reason=reason)

    @classmethod
    def from_costs(cls, costs: LayerCosts, direct_max_tokens: int | None) -> "ModePolicy":
        """`auto` on a device with both views; a limit set by the user goes before the model's."""
        if direct_max_tokens is not None:
            return cls(direct_max_tokens=direct_max_tokens, reason="direct_max_tokens was set")
        limit = costs.direct_max_tokens
        steps = "every step" if limit == math.inf else f"steps of up to {limit} tokens"
        return cls(direct_max_tokens=limit, reason=f"by the cost model, direct for {steps}")

    def mode_for(self, num_tokens: float) -> Mode:
        """The mode of a forward of `num_tokens`."""
        return Mode.DIRECT if num_tokens <= self.direct_max_tokens else Mode.PREFETCH

    @property
    def modes(self) -> frozenset[Mode]:
        """The modes in which forwards can run: that of the smallest and that of the largest."""
        return frozenset({self.mode_for(1), self.mode_for(math.inf)})

    @property
    def name(self) -> str:
        """`direct` or `prefetch` if it never changes, else `auto`."""
        return "auto" if len(self.modes) > 1 else next(iter(self.modes)).value
