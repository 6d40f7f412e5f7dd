"""Rows about deployments: context only, slices, SGLang, end to end."""

from collections.abc import Iterator

from vllm_dwdp.paper.factors import Row, gpt_oss_model, r1_model, row
from vllm_dwdp.paper.kernels import PUBLISHED_VARIATION
from vllm_dwdp.paper.saturated import Lengths, dep_tokens_per_s, saturated_gain
from vllm_dwdp.planner.contention import Pulls
from vllm_dwdp.planner.disaggregated import Service, end_to_end_gain

CONTEXT_SHARE = 0.8
"""Shortest over longest prompt of the context-only benchmarks, where the source says no other."""


def _gain(
    lengths: Lengths, max_tokens: int, group_size: int = 4, pulls: Pulls | None = None
) -> float:
    return saturated_gain(
        r1_model(), r1_model(group_size), lengths, max_tokens, PUBLISHED_VARIATION, pulls
    )


def _both(
    source: str, what: str, published: tuple[float, float], ttft: float, tps: float
) -> Iterator[Row]:
    for quantity, seen, ours in (("TTFT", published[0], ttft), ("TPS/GPU", published[1], tps)):
        yield row(source, f"{quantity}, {what}", seen, ours)


def context_only() -> Iterator[Row]:
    """[P table 3] DWDP over DEP4: time to first token, tokens per second and GPU."""
    by_isl = ((1024, 1.27, 1.11), (8192, 1.16, 1.10), (16384, 1.12, 1.09), (32768, 1.11, 1.09))
    for tokens, ttft, tps in by_isl:
        gain = _gain(Lengths(tokens, CONTEXT_SHARE), 32768)
        yield from _both("context only, by ISL", f"ISL {tokens}", (ttft, tps), gain, gain)
    for max_tokens, ttft, tps in ((16384, 1.07, 1.01), (32768, 1.16, 1.10)):
        gain = _gain(Lengths(8192, CONTEXT_SHARE), max_tokens)
        yield from _both("context only, by MNT", f"MNT {max_tokens}", (ttft, tps), gain, gain)
    by_std = ((0, 1.12, 1.09), (1024, 1.11, 1.08), (2048, 1.13, 1.11), (4096, 1.18, 1.15))
    for deviation, ttft, tps in by_std:
        gain = _gain(Lengths(16384, deviation=deviation), 32768)
        yield from _both(
            "context only, by STD", f"ISL 16384, STD {deviation}", (ttft, tps), gain, gain
        )
    for group_size, ttft, tps in ((3, 0.86, 1.093), (4, 1.15, 1.091)):
        gain = _gain(Lengths(16384, CONTEXT_SHARE), 32768, group_size)
        # The same requests over fewer GPUs wait longer.
        yield from _both(
            "context only, by group", f"DWDP{group_size}", (ttft, tps), gain * group_size / 4, gain
        )


def slicing() -> Iterator[Row]:
    """[P table 4] TPS/GPU over DEP without and with slices."""
    whole = Pulls(group_size=4, slices_per_peer=1, in_flight=1)
    published = (
        (0.5, 16384, 0.995, 1.081),
        (0.5, 32768, 1.140, 1.139),
        (0.8, 16384, 1.039, 1.053),
        (0.8, 32768, 1.098, 1.109),
    )
    for share, max_tokens, without, with_slices in published:
        for what, seen, pulls in (("without", without, whole), ("with", with_slices, None)):
            quantity = f"TPS/GPU {what} slices, lengths {share} - 1, MNT {max_tokens}"
            gain = _gain(Lengths(8192, share), max_tokens, pulls=pulls)
            yield row("slices", quantity, seen, gain)


def sglang() -> Iterator[Row]:
    """[S] gpt-oss-120b, prefill only, DWDP4 over DEP4."""
    model, source = gpt_oss_model(), "SGLang, gpt-oss-120b, B200 x4, prefill, MNT 16384"
    for tokens, seen in ((4096, 1.16), (8192, 1.37), (16384, 1.18)):
        gain = saturated_gain(model, model, Lengths(tokens), 16384, PUBLISHED_VARIATION)
        yield row(source, f"throughput, ISL {tokens}", seen, gain)


def end_to_end() -> Iterator[Row]:
    """[P tables 5, 6] 8K/1K, context and generation on separate servers, DWDP for the context."""
    published = (
        ("20-30", 25.0, 1.15, 1.10),
        ("40-50", 45.0, 1.16, 1.08),
        ("60-70", 65.0, 1.00, 1.10),
        ("80-90", 85.0, 1.00, 1.06),
        ("170-180", 175.0, 1.00, 0.97),
    )
    source, gains = "end to end, 8K/1K", []
    lengths = Lengths(8192, CONTEXT_SHARE)
    context_gain = _gain(lengths, 32768)
    rate = dep_tokens_per_s(r1_model(), lengths, 32768, PUBLISHED_VARIATION)
    for band, tokens_per_user, per_user, per_gpu in published:
        service = Service(
            input_tokens=lengths.mean, output_tokens=1024, tokens_per_user=tokens_per_user
        )
        gain = end_to_end_gain(r1_model(), service, rate, context_gain)
        if tokens_per_user < 100:
            gains.append(gain)
        yield row(source, f"TPS/user, at {band} (generation servers unchanged)", per_user, 1.0)
        yield row(source, f"TPS/GPU, at {band}", per_gpu, gain)
    mean = sum(gains) / len(gains)
    yield row(source, "TPS/GPU, mean over 20 - 100 TPS/user", 1.088, mean)
