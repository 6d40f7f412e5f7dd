"""What the front end decides once and every process of a rank needs.

Pure values, planted into vLLM's config and pickled with it into the processes of the ranks.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.distributed.endpoint import Endpoint

BIND_ENV = "VLLM_CPU_OMP_THREADS_BIND"
"""vLLM's: the cores of each rank on the CPU, where the user names them."""
SHARED_CORES_ENV = "DWDP_SHARED_CORES"
"""Set for front ends that divide the cores which each of them may use."""


@dataclass(frozen=True)
class RankSpan:
    """The ranks that one front end starts, among all ranks of the deployment.

    Args:
        first: global rank of its first engine (not 0 when ranks or nodes are started one by one).
        count: engines that it starts.
        total: ranks of the whole deployment; on the CPU all on this host.
        own_cores: whether the cores that the front end may use are for its ranks only; else all ranks of
            the deployment divide them.
    """

    first: int
    count: int
    total: int
    own_cores: bool = False


@dataclass(frozen=True, kw_only=True)
class DwdpLaunch:
    """The facts from which a rank finds its seat.

    Args:
        config: the checked options.
        ranks: those that this front end starts.
        endpoint: where the ranks meet.
        tensor_parallel_size: workers of each rank, of which each has a slice of every tensor.
    """

    config: DwdpConfig
    ranks: RankSpan
    endpoint: Endpoint
    tensor_parallel_size: int = 1

    def seat(self, rank: int) -> "Seat":
        """Return the seat of global rank `rank`, which is also the index of its engine.

        Of several workers the first one's.
        """
        return Seat(self, rank)

    @property
    def seats(self) -> tuple["Seat", ...]:
        """The seats of all workers of this front end, in order."""
        first = self.ranks.first
        return self.seats_of(range(first, first + self.ranks.count))

    @property
    def all_seats(self) -> tuple["Seat", ...]:
        """The seats of all workers of the deployment, in order."""
        return self.seats_of(range(self.ranks.total))

    def seats_of(self, ranks: Iterable[int]) -> tuple["Seat", ...]:
        """Return the seats of all workers of these ranks, in order."""
        return tuple(seat for rank in ranks for seat in self.seat(rank).of_tensor_ranks)


@dataclass(frozen=True)
class Seat:
    """One rank of a deployment, and its position among the ranks that share experts.

    With tensor parallelism inside of a rank its workers have a seat each. Those of one tensor rank share
    the experts' slices with each other, so they are a group of their own.

    Args:
        launch: what the front end decided.
        rank: global data-parallel rank.
        tensor_rank: of the worker within its rank.
    """

    launch: DwdpLaunch
    rank: int
    tensor_rank: int = 0

    @property
    def group(self) -> int:
        """The number of the worker's group within the deployment."""
        return self._place[0]

    @property
    def dwdp_rank(self) -> int:
        """The rank's position within its group."""
        return self._place[1]

    @property
    def _place(self) -> tuple[int, int]:
        launch = self.launch
        size = launch.config.group_size
        return place_in_group(self.rank, size, self.tensor_rank, launch.tensor_parallel_size)

    @property
    def of_tensor_ranks(self) -> tuple["Seat", ...]:
        """The seats of all workers of the rank, in order."""
        tensor_ranks = range(self.launch.tensor_parallel_size)
        return tuple(replace(self, tensor_rank=each) for each in tensor_ranks)

    @property
    def tensor_slice(self) -> str:
        """Which slice of every tensor the worker has."""
        return f"{self.tensor_rank} of {self.launch.tensor_parallel_size}"

    @property
    def name(self) -> str:
        """What the worker is called in a sentence."""
        tensor = (
            f" (tensor rank {self.tensor_rank})" if self.launch.tensor_parallel_size > 1 else ""
        )
        return f"{self.rank}{tensor}"

    def status(self) -> dict[str, Any]:
        """Which worker it is, as JSON."""
        return {
            "rank": self.rank,
            "group": self.group,
            "dwdp_rank": self.dwdp_rank,
            "group_size": self.launch.config.group_size,
            "tensor_rank": self.tensor_rank,
            "tensor_parallel_size": self.launch.tensor_parallel_size,
        }

    @property
    def core_slots(self) -> range:
        """The positions of the rank's workers among those that divide the cores of its front end."""
        ranks, size = self.launch.ranks, self.launch.tensor_parallel_size
        first = (self.rank - ranks.first if ranks.own_cores else self.rank) * size
        return range(first, first + size)

    @property
    def num_core_slots(self) -> int:
        """How many workers divide these cores."""
        ranks = self.launch.ranks
        return (ranks.count if ranks.own_cores else ranks.total) * self.launch.tensor_parallel_size


def place_in_group(
    rank: int, group_size: int, tensor_rank: int = 0, tensor_parallel_size: int = 1
) -> tuple[int, int]:
    """Return the number of a worker's group within the deployment, and its position there."""
    return rank // group_size * tensor_parallel_size + tensor_rank, rank % group_size
