"""What the front end decides once and every process of a rank needs.

Pure values, planted into vLLM's config and pickled with it into the processes of the ranks.
"""

from dataclasses import dataclass

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
    """

    config: DwdpConfig
    ranks: RankSpan
    endpoint: Endpoint

    def seat(self, rank: int) -> "Seat":
        """The seat of global rank `rank`, which is also the index of its engine."""
        return Seat(self, rank)

    @property
    def seats(self) -> tuple["Seat", ...]:
        """The seats of all engines of this front end, in order."""
        first = self.ranks.first
        return tuple(self.seat(rank) for rank in range(first, first + self.ranks.count))


@dataclass(frozen=True)
class Seat:
    """One rank of a deployment, and its position among the ranks that share experts.

    Args:
        launch: what the front end decided.
        rank: global data-parallel rank.
    """

    launch: DwdpLaunch
    rank: int

    @property
    def group(self) -> int:
        """The number of the rank's group within the deployment."""
        return self.rank // self.launch.config.group_size

    @property
    def dwdp_rank(self) -> int:
        """The rank's position within its group."""
        return self.rank % self.launch.config.group_size

    @property
    def core_slot(self) -> int:
        """The rank's position among those that divide the cores of its front end."""
        ranks = self.launch.ranks
        return self.rank - ranks.first if ranks.own_cores else self.rank

    @property
    def num_core_slots(self) -> int:
        """How many ranks divide these cores."""
        ranks = self.launch.ranks
        return ranks.count if ranks.own_cores else ranks.total
