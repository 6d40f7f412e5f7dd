"""Independent ranks: vLLM treats our MoE ranks as it treats those of a dense model.

vLLM couples data-parallel ranks (dummy batches, waves, collectives) when `ModelConfig.is_moe` is
true, and runs them independently otherwise. Our configs therefore carry a `ModelConfig` subclass
that answers False. It pickles by reference, so an engine process sees the right answer before any
plugin is loaded there. The executor restores the real class before workers start, because models
ask for expert groups while they are built.
"""

from dataclasses import dataclass
from typing import Any

from vllm.config import ModelConfig

from vllm_dwdp.config import DwdpLaunch

_LAUNCH = "dwdp_launch"


class IndependentModelConfig(ModelConfig):
    """A `ModelConfig` whose data-parallel ranks do not know of each other."""

    @property
    def is_moe(self) -> bool:
        """False: what vLLM keys the coupling of ranks on."""
        return False


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which ranks this front end starts.

    Args:
        first_rank: global rank of its engine 0.
        local_size: engines it starts itself.
        started_one_by_one: whether other ranks are started by somebody else.
        own_server: whether its engines serve only this front end (external and hybrid load
            balancing, SPMD), so that vLLM need not know of the other ranks at all.
        spmd_name: a name common to the processes of vLLM's SPMD offline style, else None.
    """

    first_rank: int
    local_size: int
    started_one_by_one: bool
    own_server: bool
    spmd_name: str | None = None


def find_place(args: Any, vllm_config: Any, size: int, *, headless: bool) -> Place:
    """Read the ranks of this front end off the config that vLLM made."""
    from vllm import envs

    parallel = vllm_config.parallel_config
    if args.data_parallel_size == 1 and parallel.data_parallel_size > 1:
        return Place(
            first_rank=parallel.data_parallel_rank,
            local_size=1,
            started_one_by_one=True,
            own_server=True,
            spmd_name=f"spmd-{envs.VLLM_DP_MASTER_IP}-{envs.VLLM_DP_MASTER_PORT}",
        )
    if parallel.data_parallel_external_lb or parallel.data_parallel_hybrid_lb:
        return Place(
            first_rank=parallel.data_parallel_rank,
            local_size=parallel.data_parallel_size_local,
            started_one_by_one=True,
            own_server=True,
        )
    local = parallel.data_parallel_size_local if parallel.data_parallel_size > 1 else size
    return Place(
        first_rank=0,
        local_size=local,
        started_one_by_one=headless or local < size,
        own_server=False,
    )


def make_independent(vllm_config: Any, launch: DwdpLaunch, place: Place) -> None:
    """Plant `launch` and uncouple the ranks, in place."""
    model_config = vllm_config.model_config
    object.__setattr__(model_config, _LAUNCH, launch)
    object.__setattr__(model_config, "__class__", IndependentModelConfig)
    parallel = vllm_config.parallel_config
    if place.own_server:
        parallel.data_parallel_size = place.local_size
        parallel.data_parallel_size_local = place.local_size
        parallel.data_parallel_rank = parallel.data_parallel_index = 0
        parallel.data_parallel_rank_local = None
        parallel.data_parallel_external_lb = parallel.data_parallel_hybrid_lb = False
    elif parallel.data_parallel_size == 1 and place.local_size > 1:  # offline LLM of several ranks
        parallel.data_parallel_size = parallel.data_parallel_size_local = place.local_size
        parallel.data_parallel_rank_local = None


def restore_model_config(vllm_config: Any) -> None:
    """Give the model config its real class back; call before workers start."""
    object.__setattr__(vllm_config.model_config, "__class__", ModelConfig)


def launch_of(vllm_config: Any) -> DwdpLaunch:
    """The launch facts that the front end planted."""
    launch = vllm_config.model_config.__dict__[_LAUNCH]
    assert isinstance(launch, DwdpLaunch)
    return launch
