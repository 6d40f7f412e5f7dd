"""Independent ranks: vLLM treats our MoE ranks as it treats those of a dense model.

vLLM couples data-parallel ranks (dummy batches, waves, collectives) when `ModelConfig.is_moe` is
true, and runs them independently otherwise. Our configs therefore carry a `ModelConfig` subclass
that answers False. It pickles by reference, so an engine process sees the right answer before any
plugin is loaded there. The executor restores the real class before workers start, because models
ask for expert groups while they are built.
"""

from typing import Any

from vllm.config import ModelConfig

from vllm_dwdp.distributed.launch import DwdpLaunch, Seat

_LAUNCH = "dwdp_launch"


class IndependentModelConfig(ModelConfig):
    """A `ModelConfig` whose data-parallel ranks do not know of each other."""

    @property
    def is_moe(self) -> bool:
        """False: what vLLM keys the coupling of ranks on."""
        return False


def plant(vllm_config: Any, launch: DwdpLaunch) -> None:
    """Put `launch` into the model config, in place, and make its ranks independent."""
    object.__setattr__(vllm_config.model_config, _LAUNCH, launch)
    object.__setattr__(vllm_config.model_config, "__class__", IndependentModelConfig)


def is_planted(vllm_config: Any) -> bool:
    """Whether this config was made for independent ranks."""
    return isinstance(vllm_config.model_config, IndependentModelConfig)


def restore_model_config(vllm_config: Any) -> None:
    """Give the model config its real class back; call before workers start."""
    object.__setattr__(vllm_config.model_config, "__class__", ModelConfig)


def match_front_end_cache(vllm_config: Any) -> None:
    """Give an engine no cache of processed images where its front end keeps none for it.

    A front end of several ranks keeps them itself, and sends them whole. vLLM decides by the number of
    ranks, of which an independent engine knows one: it would keep what no rank refers to, or wait for
    shared memory (`--mm-processor-cache-type shm`) that no process made. Call before workers start.
    """
    multimodal = vllm_config.model_config.multimodal_config
    has_front_end_of_its_own = vllm_config.parallel_config.data_parallel_external_lb
    is_one_of_several = seat_of(vllm_config).launch.ranks.total > 1
    if multimodal is not None and is_one_of_several and not has_front_end_of_its_own:
        multimodal.mm_processor_cache_gb = 0


def seat_of(vllm_config: Any, tensor_rank: int = 0) -> Seat:
    """Return the seat of a worker of the engine that this config was made for."""
    launch = vllm_config.model_config.__dict__[_LAUNCH]
    assert isinstance(launch, DwdpLaunch)
    return Seat(launch, vllm_config.parallel_config.data_parallel_index, tensor_rank)
