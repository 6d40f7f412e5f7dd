"""Context and generation on separate servers: tokens per second and GPU of both together.

A request costs its prompt on context GPUs and its answer on generation GPUs. Generation servers run
expert parallelism over `GENERATION_GPUS` GPUs, with the largest batch whose step keeps the wanted
tokens per second and user; DWDP changes the context side only.
"""

from dataclasses import dataclass, replace

from vllm_dwdp.planner.checked import real
from vllm_dwdp.planner.cost import CostModel, Step

GENERATION_GPUS = 16
"""Of an expert-parallel generation server; the paper does not say, and wide ones are usual."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """What the users get.

    Args:
        input_tokens, output_tokens: per request.
        tokens_per_user: generated tokens per second of one request.
    """

    input_tokens: float
    output_tokens: float
    tokens_per_user: float

    def __post_init__(self) -> None:
        real("--output-tokens", self.output_tokens, 1)
        real("--tokens-per-user", self.tokens_per_user, above=True)


def generation_batch(model: CostModel, service: Service) -> float:
    """Find how many sequences per GPU decode together and still get `tokens_per_user`; 0 if not one.

    Args:
        model: of a generation server.
    """
    context = service.input_tokens + service.output_tokens / 2

    low, high = 0.0, 4096.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        fits = model.dep_step(Step.decode(middle, context)) * service.tokens_per_user <= 1.0
        low, high = (middle, high) if fits else (low, middle)
    return low


def gpu_seconds(
    model: CostModel, service: Service, context_tokens_per_s: float
) -> tuple[float, float]:
    """Return the GPU seconds per request, on context and on generation servers.

    Args:
        model: of the context servers.
        context_tokens_per_s: prompt tokens per second and context GPU.
    """
    generation = replace(model, group_size=GENERATION_GPUS, extra_experts=0)
    rate = generation_batch(generation, service) * service.tokens_per_user
    generating = service.output_tokens / rate if rate else float("inf")
    return service.input_tokens / context_tokens_per_s, generating


def end_to_end_gain(
    model: CostModel, service: Service, context_tokens_per_s: float, context_gain: float
) -> float:
    """Return tokens per second and GPU of the whole deployment, DWDP over DEP on the context servers.

    Args:
        context_tokens_per_s: of DEP.
        context_gain: DWDP's over it.
    """
    context, generating = gpu_seconds(model, service, context_tokens_per_s)
    return (context + generating) / (context / context_gain + generating)


def output_tokens_per_s(model: CostModel, service: Service, context_tokens_per_s: float) -> float:
    """Return generated tokens per second and GPU of both kinds of servers; 0 if none serves the users.

    Args:
        context_tokens_per_s: prompt tokens per second and context GPU.
    """
    return service.output_tokens / sum(gpu_seconds(model, service, context_tokens_per_s))
