"""Direct or prefetch: chosen for each forward of the model, by the tokens that it computes. Pure.

Direct reads only the remote experts that the step's tokens are routed to, but inside the kernels, which
wait meanwhile; prefetch copies all of them, beside the kernels of the layer before. So direct wins for
steps of few tokens, and for no others. With `E` experts of which `R` are remote, `k` per token, `b`
tokens, `C(b)` the compute of a layer that has its experts at hand, and `i` what copies add to it:

::

    distinct remote experts   D(b) = R * (1 - (1 - k / E) ** b)
    readings of each          N(b) = max(1, b * k / E / TILE_TOKENS)
    direct, per layer         C(b) + D(b) * N(b) * expert_bytes / min(direct speed, copy speed)
    prefetch, per layer       max(R * expert_bytes / copy speed, C(b) + i)

Direct hides nothing, so from the step on whose compute hides the copies it is never chosen. A grouped
product reads the weights of an expert once for each tile of its tokens, and a peer's lines stay in the
peer's cache, not in the reader's. Reads in place cross the same link as copies: a measurement in which
they are faster found something else (memory of one device, copies that lack a copy engine), and counts
as equal. Nor is direct ever chosen above `MOST_DIRECT_TOKENS`, whatever was measured: a wrong prefetch
costs a layer one fill at most, a wrong direct the readings of all experts, with nothing beside them.

Source: the roofline of arXiv 2604.01621, section 3, applied to both modes. No GPU has shown any of it.
On the host device the copy costs the cores that compute, so direct always wins there, without a model.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

MOST_DIRECT_TOKENS = 512
"""Of a step that reads in place without being told to. It is vLLM's default for the largest step that it
captures, and steps of more tokens reach (nearly) all experts of every MoE in use: then reading in place
has no advantage left but a speed that was measured."""
TILE_TOKENS = 64
"""Tokens of an expert that share one reading of its weights in a grouped product; an assumption."""
LARGEST_STEP = 1 << 20
"""Tokens up to which a break-even is looked for."""
_ROUNDING = 1e-9


class Mode(StrEnum):
    """How a forward obtains remote experts."""

    DIRECT = "direct"
    PREFETCH = "prefetch"


@dataclass(frozen=True, kw_only=True)
class LayerCosts:
    """What one MoE layer costs on one rank.

    Args:
        num_experts: routed experts of the layer.
        num_remote_experts: of these, not resident; at least one.
        experts_per_token: chosen by the router for each token.
        remote_bytes: bytes of the remote experts, all their parameters.
        copy_bytes_per_s: speed of copies from peers.
        direct_bytes_per_s: speed of kernels that read peers in place.
        compute_seconds: of the layer by the tokens of a step, all experts at hand, and of the layers
            without experts beside its copies; never falls.
        beside_copies: speed of compute while copies flow beside it, as a part of its speed alone.
    """

    num_experts: int
    num_remote_experts: int
    experts_per_token: int
    remote_bytes: float
    copy_bytes_per_s: float
    direct_bytes_per_s: float
    compute_seconds: Callable[[int], float]
    beside_copies: float = 1.0

    @property
    def copy_seconds(self) -> float:
        """Seconds of a layer's copies."""
        return self.remote_bytes / self.copy_bytes_per_s

    def expected_remote_experts(self, num_tokens: int) -> float:
        """Distinct remote experts that `num_tokens` tokens need, routing uniform and independent."""
        missed = (1.0 - self.experts_per_token / self.num_experts) ** num_tokens
        return self.num_remote_experts * (1.0 - missed)

    def readings(self, num_tokens: int) -> float:
        """How often a kernel reads an expert that `num_tokens` tokens are routed to."""
        tokens_per_expert = num_tokens * self.experts_per_token / self.num_experts
        return max(1.0, tokens_per_expert / TILE_TOKENS)

    def direct_seconds(self, num_tokens: int) -> float:
        """Seconds of a layer that reads its remote experts in place."""
        share = self.expected_remote_experts(num_tokens) / self.num_remote_experts
        speed = min(self.direct_bytes_per_s, self.copy_bytes_per_s)
        read = share * self.readings(num_tokens) * self.remote_bytes / speed
        return self.compute_seconds(num_tokens) + read

    def prefetch_seconds(self, num_tokens: int) -> float:
        """Seconds of a layer whose remote experts are copied while the layer before it runs."""
        return max(self.copy_seconds, self._beside_copies(num_tokens))

    @property
    def break_even_tokens(self) -> int | None:
        """The smallest step that computes long enough to hide its copies; None up to `LARGEST_STEP`.

        None also where compute stops beside copies: then nothing hides anything.
        """
        if self.beside_copies == 0:
            return None
        least = self.copy_seconds * (1.0 - _ROUNDING)
        found = _first(lambda tokens: self._beside_copies(tokens) >= least, LARGEST_STEP)
        return None if found > LARGEST_STEP else found

    @property
    def direct_max_tokens(self) -> int:
        """The largest step for which direct is at least as fast; at most `MOST_DIRECT_TOKENS`."""
        hidden_from = self.break_even_tokens or MOST_DIRECT_TOKENS + 1
        most = min(MOST_DIRECT_TOKENS, hidden_from - 1)

        def is_slower(num_tokens: int) -> bool:
            return self.direct_seconds(num_tokens) > self.prefetch_seconds(num_tokens)

        return _first(is_slower, most) - 1

    def _beside_copies(self, num_tokens: int) -> float:
        interference = (1.0 - self.beside_copies) * self.copy_seconds
        return self.compute_seconds(num_tokens) + interference


@dataclass(frozen=True, kw_only=True)
class ModePolicy:
    """The decision of one rank.

    Args:
        direct_max_tokens: forwards of at most this many tokens read in place; `inf`: all, `-inf`: none.
        reason: one phrase for the log and the status.
        break_even_tokens: the smallest step that hides its copies on this rank; None where there is
            none, or it is unknown.
    """

    direct_max_tokens: float
    reason: str
    break_even_tokens: int | None = None

    @classmethod
    def forced(cls, mode: Mode, break_even_tokens: int | None = None) -> "ModePolicy":
        """Return the policy of a user who chose `mode`."""
        return cls(
            direct_max_tokens=math.inf if mode is Mode.DIRECT else -math.inf,
            reason=f"mode {mode.value!r} was asked for",
            break_even_tokens=break_even_tokens,
        )

    @classmethod
    def direct_only(cls, *, shares_compute: bool) -> "ModePolicy":
        """`auto` where copies cannot win: on the host device, or if there is nothing to copy."""
        reason = "this rank's memory holds all experts"
        if shares_compute:
            reason = "on the host, copies would share the computing cores and their memory"
        return cls(direct_max_tokens=math.inf, reason=reason)

    @classmethod
    def by_tokens(
        cls, limit: int, break_even_tokens: int | None, *, was_set: bool = False
    ) -> "ModePolicy":
        """`auto` on a device with both views.

        Args:
            limit: of the user, or else of the group.
            was_set: whether it is the user's.
        """
        reason = f"by the group's cost model, direct for steps of up to {limit} tokens"
        if was_set:
            reason = "direct_max_tokens was set"
        return cls(direct_max_tokens=limit, reason=reason, break_even_tokens=break_even_tokens)

    def without_direct(self) -> "ModePolicy":
        """Return the policy of a device that cannot map peers' experts in place."""
        reason = "this device maps no peers' experts in place"
        return replace(self, direct_max_tokens=-math.inf, reason=reason)

    def mode_for(self, num_tokens: float) -> Mode:
        """Return the mode of a forward of `num_tokens`."""
        return Mode.DIRECT if num_tokens <= self.direct_max_tokens else Mode.PREFETCH

    @property
    def limit(self) -> int | None:
        """The largest step that reads in place; None if all steps do, or none does."""
        return int(self.direct_max_tokens) if math.isfinite(self.direct_max_tokens) else None

    @property
    def modes(self) -> frozenset[Mode]:
        """The modes in which forwards can run: that of the smallest and that of the largest."""
        return frozenset({self.mode_for(1), self.mode_for(math.inf)})

    @property
    def name(self) -> str:
        """`direct` or `prefetch` if it never changes, else `auto`."""
        return "auto" if len(self.modes) > 1 else next(iter(self.modes)).value


def _first(holds: Callable[[int], bool], largest: int) -> int:
    """Return the smallest number >= 1 for which monotone `holds` is true, else `largest + 1`."""
    low, high = 1, largest + 1
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low
