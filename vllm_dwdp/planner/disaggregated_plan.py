"""`vllm-dwdp plan --decode-servers`: how many prefill ranks feed them, and with which chunk.

What is compared is the prefill side, DWDP ranks against expert-parallel ones, in front of the same
decode servers. A prefill rank may be several GPUs (tensor parallelism); a decode server has one rank on
each of its GPUs.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from vllm_dwdp.planner.checked import whole
from vllm_dwdp.planner.cost import CostModel
from vllm_dwdp.planner.disaggregated import (
    CHUNKS,
    ENOUGH,
    SMALLEST_SHARE,
    ChunkRates,
    DecodeBatch,
    Service,
    chunk_rates,
    decode_batch,
    end_to_end_gain,
    lone_prompt,
    recommended,
    requests_per_s,
)
from vllm_dwdp.planner.estimates import ROUTING_SKEW
from vllm_dwdp.planner.memory import expert_parallel_kv_bytes
from vllm_dwdp.planner.plan import Figure, Plan
from vllm_dwdp.planner.traffic import Traffic

TOPIC = "prefill for decode servers"
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class DecodeServers:
    """What the prefill ranks feed.

    Args:
        number: of servers.
        num_gpus: of each.
        tokens_per_user: generated tokens per second of one request.
    """

    number: int
    num_gpus: int
    tokens_per_user: float

    def __post_init__(self) -> None:
        whole("--decode-servers", self.number, 1)


@dataclass(frozen=True, kw_only=True)
class Feeding:
    """Prefill ranks in front of decode servers, in figures.

    Args:
        model: of a group of prefill ranks.
        decode_model: of any deployment of the same model whose ranks are one GPU each.
        traffic: its `max_num_batched_tokens` is compared beside `CHUNKS`.
    """

    model: CostModel
    decode_model: CostModel
    traffic: Traffic
    servers: DecodeServers

    @cached_property
    def service(self) -> Service:
        """What one decode server does; prompts spread below the longest."""
        return Service(
            input_tokens=self.traffic.input_tokens * (1 + SMALLEST_SHARE) / 2,
            output_tokens=self.traffic.output_tokens,
            tokens_per_user=self.servers.tokens_per_user,
            decode_gpus=self.servers.num_gpus,
        )

    @cached_property
    def batch(self) -> DecodeBatch:
        """The sequences that decode together on a GPU."""
        return decode_batch(self.decode_model, self.service)

    @cached_property
    def requests_per_s(self) -> float:
        """What one decode server takes."""
        return requests_per_s(self.decode_model, self.service)

    @cached_property
    def curve(self) -> tuple[ChunkRates, ...]:
        """What prefill ranks do, by chunk."""
        chunks = sorted({*CHUNKS, self.traffic.max_num_batched_tokens})
        return tuple(chunk_rates(self.model, self.traffic.input_tokens, one) for one in chunks)

    @cached_property
    def sides(self) -> tuple["Side", "Side"]:
        """DWDP and expert-parallel prefill, each with the chunk that suits it."""
        return (
            Side("DWDP", *recommended([(rates.chunk, rates.dwdp) for rates in self.curve])),
            Side("expert parallelism", *recommended([(r.chunk, r.dep) for r in self.curve])),
        )

    @property
    def gain_of_both(self) -> float:
        """Generated tokens per second and GPU, prefill included, DWDP over expert parallelism."""
        dwdp, dep = (side.tokens_per_s for side in self.sides)
        of_a_gpu = dep / self.model.hardware.num_gpus
        return end_to_end_gain(self.decode_model, self.service, of_a_gpu, dwdp / dep)

    def ranks(self, side: "Side") -> float:
        """Return the busy prefill ranks for one decode server."""
        return self.requests_per_s * self.service.input_tokens / side.tokens_per_s

    def ranks_to_start(self, side: "Side") -> int:
        """Return the ranks for all decode servers: experts are shared, or divided, in whole groups."""
        size = self.model.group_size
        return size * math.ceil(self.servers.number * self.ranks(side) / size - _ROUNDING)

    def alone(self, side: "Side") -> float:
        """Return the seconds until a prompt has its first token that meets no other."""
        seconds = lone_prompt(self.model, self.traffic.input_tokens, side.chunk)
        return seconds[self.sides.index(side)]


class Side(NamedTuple):
    """One way to run the prefill ranks.

    Args:
        chunk: `max_num_batched_tokens` to use.
        tokens_per_s: prompt tokens per second and rank, always busy.
    """

    name: str
    chunk: int
    tokens_per_s: float


def plan_feeding(feeding: Feeding) -> Plan:
    """Say what `plan` shows of decode servers."""
    if feeding.batch.size == 0:
        return Plan(
            figures=tuple(_decode_side(feeding)),
            advice=tuple(_why_nobody(feeding)),
            assumptions=tuple(_assumptions(feeding)),
        )
    return Plan(
        figures=(*_decode_side(feeding), *_chunks(feeding), *_prefill_side(feeding)),
        advice=tuple(_advise(feeding)),
        assumptions=tuple(_assumptions(feeding)),
    )


def _decode_side(feeding: Feeding) -> Iterator[Figure]:
    batch, shape = feeding.batch, feeding.decode_model.shape
    users = f"{feeding.servers.tokens_per_user:g} tokens/s each"
    tokens_per_s = feeding.requests_per_s * feeding.service.input_tokens
    kv_bytes = shape.kv_bytes_per_token(feeding.service.input_tokens)
    rows = (
        (f"sequences per decode GPU, {users}", batch.by_speed, "sequences"),
        ("sequences per decode GPU whose KV cache fits", batch.by_memory, "sequences"),
        ("requests of one decode server", feeding.requests_per_s, "1/s"),
        ("prompt tokens for one decode server", tokens_per_s, "tokens/s"),
        ("KV cache that arrives at one decode server", tokens_per_s * kv_bytes / 1e9, "GB/s"),
    )
    for quantity, value, unit in rows:
        yield _figure(quantity, value, unit, feeding)


def _chunks(feeding: Feeding) -> Iterator[Figure]:
    for rates in feeding.curve:
        quantity = f"DWDP over expert parallelism, steps of {rates.chunk:,}"
        yield _figure(quantity, rates.gain, "x", feeding)


def _prefill_side(feeding: Feeding) -> Iterator[Figure]:
    for side in feeding.sides:
        rows = (
            (f"max_num_batched_tokens, {side.name}", side.chunk, "tokens"),
            (f"prompt tokens per rank, {side.name}", side.tokens_per_s, "tokens/s"),
            (f"ranks per decode server, {side.name}", feeding.ranks(side), "ranks"),
            (f"ranks to start, {side.name}", feeding.ranks_to_start(side), "ranks"),
            (f"a prompt that meets no other, {side.name}", 1e3 * feeding.alone(side), "ms"),
        )
        for quantity, value, unit in rows:
            yield _figure(quantity, value, unit, feeding)
    quantity = "generated tokens per GPU of both sides, DWDP over expert parallelism"
    yield _figure(quantity, feeding.gain_of_both, "x", feeding)


def _figure(quantity: str, value: float, unit: str, feeding: Feeding) -> Figure:
    origin = feeding.model.efficiency.origin(assumed=True)
    return Figure(topic=TOPIC, quantity=quantity, low=value, high=value, unit=unit, origin=origin)


def _why_nobody(feeding: Feeding) -> Iterator[str]:
    gpus, users = _gpus(feeding.servers.num_gpus), feeding.servers.tokens_per_user
    if feeding.batch.by_memory == 0:
        server = replace(
            feeding.decode_model, group_size=feeding.service.decode_gpus, extra_experts=0
        )
        yield (
            f"A decode server of {gpus} does not fit: a GPU lacks "
            f"{-expert_parallel_kv_bytes(server) / 1e9:.0f} GB. Give it more GPUs (--decode-gpus)."
        )
    else:
        yield (
            f"No decode server of {gpus} gives a user {users:g} tokens/s: ask "
            "for fewer (--tokens-per-user)."
        )


def _advise(feeding: Feeding) -> Iterator[str]:
    (dwdp, dep), servers = feeding.sides, feeding.servers
    gain = dwdp.tokens_per_s / dep.tokens_per_s
    if gain < 1:
        yield (
            f"Keep expert parallelism in front of the decode servers: DWDP ranks compute {gain:.2f} of "
            f"its prompt tokens, each with the chunk of up to {feeding.curve[-1].chunk:,} tokens that "
            "suits it."
        )
    yield (
        f"{servers.number} decode server{'s' * (servers.number > 1)} of {_gpus(servers.num_gpus)} "
        f"take{'s' * (servers.number == 1)} {servers.number * feeding.requests_per_s:.3g} requests/s. "
        f"{feeding.ranks_to_start(dwdp)} DWDP ranks{_of_several_gpus(feeding)} feed them, or "
        f"{feeding.ranks_to_start(dep)} expert-parallel ones: {_command(feeding)}"
    )
    asked = feeding.traffic.max_num_batched_tokens
    (rate,) = (rates.dwdp for rates in feeding.curve if rates.chunk == asked)
    if rate < ENOUGH * dwdp.tokens_per_s:
        yield (
            f"With max_num_batched_tokens={asked} a DWDP rank computes {rate / dwdp.tokens_per_s:.2f} "
            f"of the prompt tokens that it does with {dwdp.chunk}."
        )
    ours, theirs = feeding.alone(dwdp), feeding.alone(dep)
    if ours > theirs:
        yield (
            f"A prompt that meets no other waits {1e3 * ours:.0f} ms for its first token, "
            f"{ours / theirs:.2f} times as long as under expert parallelism: at low load DWDP answers "
            "later."
        )
    if feeding.batch.by_memory < feeding.batch.by_speed:
        yield (
            "The decode servers' memory ends before their speed does: more GPUs each (--decode-gpus), "
            "or a smaller KV cache (--kv-dtype fp8), serve more users."
        )


def _of_several_gpus(feeding: Feeding) -> str:
    num_gpus = feeding.model.hardware.num_gpus
    return f" of {_gpus(num_gpus)}" if num_gpus > 1 else ""


def _command(feeding: Feeding) -> str:
    """How to start it; a group may be smaller than the deployment."""
    dwdp, size = feeding.sides[0], feeding.model.group_size
    ranks, tensor = feeding.ranks_to_start(dwdp), feeding.model.hardware.num_gpus
    in_groups = f""" --additional-config '{{"dwdp": {{"group_size": {size}}}}}'"""
    return (
        f"vllm-dwdp launch MODEL --ranks {ranks} --decode-servers {feeding.servers.number} "
        f"--max-num-batched-tokens {dwdp.chunk}"
        f"{f' --tensor-parallel-size {tensor}' * (tensor > 1)}"
        f"{in_groups * (ranks > size)}{_decode_arguments(feeding.servers.num_gpus, tensor)}"
    )


def _decode_arguments(num_gpus: int, tensor_parallel_size: int) -> str:
    """Return what decode servers get besides the arguments of all servers."""
    of_one_gpu = ["--tensor-parallel-size 1"] * (tensor_parallel_size > 1)
    of_several = [f"--data-parallel-size {num_gpus} --enable-expert-parallel"] * (num_gpus > 1)
    words = " ".join(of_one_gpu + of_several)
    return f' --decode-args "{words}"' if words else ""


def _gpus(number: int) -> str:
    return f"{number} GPU{'s' * (number > 1)}"


def _assumptions(feeding: Feeding) -> Iterator[str]:
    yield (
        f"Decode servers divide the experts over {_gpus(feeding.servers.num_gpus)}; nothing has a "
        "latency, and KV caches move beside compute. Prefill ranks always have work: prompts of "
        f"{SMALLEST_SHARE:g} to 1 times the length, cut to full steps (--variation does not enter). The "
        f"busiest expert-parallel rank has {ROUTING_SKEW} times the mean load."
    )
