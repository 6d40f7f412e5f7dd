"""Prefill and decode on separate servers: what both do together, and how many of one feed the other.

A request costs its prompt on prefill GPUs and its answer on decode GPUs. Decode servers run expert
parallelism, with the largest batch whose step keeps the wanted tokens per second and user and whose
keys and values fit; DWDP changes the prefill side only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vllm_dwdp.planner.capacity import dep_capacity, dwdp_capacity
from vllm_dwdp.planner.checked import real, whole
from vllm_dwdp.planner.cost import CostModel
from vllm_dwdp.planner.estimates import ROUTING_SKEW, direct_step, reads_in_place
from vllm_dwdp.planner.memory import expert_parallel_kv_bytes
from vllm_dwdp.planner.simulate import Chunk, default_pulls, dwdp_step, lockstep, step_of
from vllm_dwdp.planner.step import Step
from vllm_dwdp.planner.traffic import Request, poisson_traffic

DECODE_GPUS = 16
"""Of an expert-parallel decode server; the paper does not say, and wide ones are usual."""
CHUNKS = (4096, 8192, 16384, 32768)
"""Of `max_num_batched_tokens`, that are compared: what publications compare."""
ENOUGH = 0.98
"""Part of the best rate that the recommended chunk reaches: a larger one only adds to the wait."""
SMALLEST_SHARE, NUM_PROMPTS = 0.8, 400
"""Prompts have 0.8 to 1 times the stated length, as in the published runs; so many are drawn."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """What the users get, and on which decode servers.

    Args:
        input_tokens, output_tokens: per request.
        tokens_per_user: generated tokens per second of one request.
        decode_gpus: of one decode server.
    """

    input_tokens: float
    output_tokens: float
    tokens_per_user: float
    decode_gpus: int = DECODE_GPUS

    def __post_init__(self) -> None:
        real("--output-tokens", self.output_tokens, 1)
        real("--tokens-per-user", self.tokens_per_user, above=True)
        whole("--decode-gpus", self.decode_gpus, 1)

    @property
    def mean_context(self) -> float:
        """The tokens of a request in the middle of its answer."""
        return self.input_tokens + self.output_tokens / 2


@dataclass(frozen=True, kw_only=True)
class DecodeBatch:
    """The sequences that decode together on a GPU.

    Args:
        by_speed: so many still get their tokens per second; 0 if not one does.
        by_memory: the keys and values of so many fit; 0 if the weights leave no room.
    """

    by_speed: float
    by_memory: float

    @property
    def size(self) -> float:
        """As many as both allow."""
        return min(self.by_speed, self.by_memory)


def decode_batch(model: CostModel, service: Service) -> DecodeBatch:
    """Find how many sequences decode together on a GPU of a decode server.

    Args:
        model: of any deployment of the same model.
    """
    server = replace(model, group_size=service.decode_gpus, extra_experts=0)
    context = service.mean_context

    low, high = 0.0, 4096.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        fits = server.dep_step(Step.decode(middle, context)) * service.tokens_per_user <= 1.0
        low, high = (middle, high) if fits else (low, middle)
    sequence_bytes = context * server.shape.kv_bytes_per_token(context)
    room = max(0.0, expert_parallel_kv_bytes(server))
    return DecodeBatch(
        by_speed=low, by_memory=room / sequence_bytes if sequence_bytes else math.inf
    )


def requests_per_s(model: CostModel, service: Service) -> float:
    """Return the requests per second that one decode server takes; 0 if it serves no user so fast."""
    batch = decode_batch(model, service).size
    return service.decode_gpus * batch * service.tokens_per_user / service.output_tokens


def gpu_seconds(
    model: CostModel, service: Service, prefill_tokens_per_s: float
) -> tuple[float, float]:
    """Return the GPU seconds per request, on prefill and on decode servers.

    Args:
        prefill_tokens_per_s: prompt tokens per second and prefill GPU.
    """
    rate = requests_per_s(model, service)
    decoding = service.decode_gpus / rate if rate else float("inf")
    return service.input_tokens / prefill_tokens_per_s, decoding


def end_to_end_gain(
    model: CostModel, service: Service, prefill_tokens_per_s: float, prefill_gain: float
) -> float:
    """Return tokens per second and GPU of the whole deployment, DWDP over DEP on the prefill servers.

    Args:
        prefill_tokens_per_s: of DEP.
        prefill_gain: DWDP's over it.
    """
    prefill, decoding = gpu_seconds(model, service, prefill_tokens_per_s)
    return (prefill + decoding) / (prefill / prefill_gain + decoding)


def output_tokens_per_s(model: CostModel, service: Service, prefill_tokens_per_s: float) -> float:
    """Return generated tokens per second and GPU of both kinds of servers; 0 if none serves the users.

    Args:
        prefill_tokens_per_s: prompt tokens per second and prefill GPU.
    """
    return service.output_tokens / sum(gpu_seconds(model, service, prefill_tokens_per_s))


@dataclass(frozen=True, kw_only=True)
class ChunkRates:
    """Prompt tokens per second and rank of ranks that always have work, whose steps have this limit.

    Args:
        chunk: `max_num_batched_tokens`.
        dwdp, dep: of either deployment.
    """

    chunk: int
    dwdp: float
    dep: float

    @property
    def gain(self) -> float:
        """DWDP over DEP."""
        return self.dwdp / self.dep


def chunk_rates(model: CostModel, input_tokens: int, chunk: int) -> ChunkRates:
    """Count what prefill ranks do whose prompts are cut to full steps, as vLLM cuts them."""
    prompts = poisson_traffic(
        num_requests=NUM_PROMPTS,
        requests_per_s=1.0,  # they all wait
        input_tokens=input_tokens,
        smallest_share=SMALLEST_SHARE,
        seed=0,
    )
    full = Step.prefill(chunk, input_tokens)
    return ChunkRates(
        chunk=chunk,
        dwdp=chunk / direct_step(model, full)
        if reads_in_place(model, full)
        else dwdp_capacity(model, prompts, max_tokens=chunk),
        dep=dep_capacity(model, prompts, max_tokens=chunk, routing_skew=ROUTING_SKEW),
    )


def recommended(curve: Sequence[tuple[int, float]]) -> tuple[int, float]:
    """Choose the smallest chunk with which ranks do nearly what they can, and say what they do.

    Args:
        curve: chunks, ascending, and the tokens per second with each.
    """
    best = max(rate for _, rate in curve)
    return next((chunk, rate) for chunk, rate in curve if rate >= ENOUGH * best)


def lone_prompt(model: CostModel, input_tokens: int, chunk: int) -> tuple[float, float]:
    """Return the seconds of a prompt that meets no other, under DWDP and under DEP."""
    prompt, pulls = Request(arrival_s=0.0, input_tokens=input_tokens), default_pulls(model)
    starts = range(0, input_tokens, chunk)
    steps = [step_of([Chunk(prompt, start, min(start + chunk, input_tokens))]) for start in starts]
    dwdp = sum(
        direct_step(model, step) if reads_in_place(model, step) else dwdp_step(model, step, pulls)
        for step in steps
    )
    return dwdp, sum(lockstep(model, [step], ROUTING_SKEW) for step in steps)
