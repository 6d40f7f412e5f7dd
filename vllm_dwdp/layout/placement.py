"""Who holds which expert. Pure: imports neither vLLM nor torch.

Every rank of a group holds one contiguous interval of each layer's experts. Without redundancy the
intervals partition the experts as evenly as possible (a count that does not divide gives the first
ranks one more); with `experts_per_rank` above that, each interval grows around its home.
"""

from dataclasses import dataclass
from functools import cached_property

from vllm_dwdp.errors import DwdpConfigError


@dataclass(frozen=True)
class ExpertRange:
    """Half-open interval `[start, stop)` of expert ids."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __contains__(self, expert: int) -> bool:
        return self.start <= expert < self.stop


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Placement of one layer's experts over a group.

    Args:
        num_experts: experts of the layer (at least 1).
        group_size: ranks that share one copy of them.
        experts_per_rank: resident experts of each rank; `None` stores every expert exactly once.

    Raises:
        DwdpConfigError: `experts_per_rank` cannot cover the layer, or exceeds it.
    """

    num_experts: int
    group_size: int
    experts_per_rank: int | None = None

    def __post_init__(self) -> None:
        assert self.num_experts > 0 and self.group_size > 0
        if self.experts_per_rank is None:
            return
        smallest = -(-self.num_experts // self.group_size)
        if not smallest <= self.experts_per_rank <= self.num_experts:
            raise DwdpConfigError(
                f"dwdp experts_per_rank={self.experts_per_rank} does not fit a layer of "
                f"{self.num_experts} experts over group_size={self.group_size}: it must lie in "
                f"[{smallest}, {self.num_experts}]. Leave it out to store every expert once."
            )

    @cached_property
    def resident(self) -> tuple[ExpertRange, ...]:
        """Experts held by each rank, `[group_size]`."""
        return tuple(self._grow(self._home(rank)) for rank in range(self.group_size))

    def source(self, expert: int, rank: int) -> int:
        """Return the rank from which `rank` reads `expert`: itself, else the next holder in rotation."""
        for step in range(self.group_size):
            candidate = (rank + step) % self.group_size
            if expert in self.resident[candidate]:
                return candidate
        raise AssertionError(f"expert {expert} has no holder")

    def _home(self, rank: int) -> ExpertRange:
        base, extra = divmod(self.num_experts, self.group_size)
        start = rank * base + min(rank, extra)
        return ExpertRange(start, start + base + (rank < extra))

    def _grow(self, home: ExpertRange) -> ExpertRange:
        smallest = -(-self.num_experts // self.group_size)
        if self.experts_per_rank is None or self.experts_per_rank == smallest:
            return home
        start = home.start - (self.experts_per_rank - len(home)) // 2
        start = min(max(start, 0), self.num_experts - self.experts_per_rank)
        return ExpertRange(start, start + self.experts_per_rank)
