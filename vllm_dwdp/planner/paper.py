"""Every published number that the model speaks to, beside the model's own.

Sources: arXiv 2604.01621 (DWDP, NVIDIA, April 2026). `predicted` rows use data-sheet peaks or exact
formulas and nothing else; `default` rows also use the default efficiencies of `hardware.DEFAULT`, which
were not fitted to them. What is not modelled is listed with the reason, and counts as not reproduced.
"""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vllm_dwdp.planner.cost import CostModel, Step, contention
from vllm_dwdp.planner.hardware import DEFAULT, PEAK, find_hardware
from vllm_dwdp.planner.model_shape import shape_of
from vllm_dwdp.planner.simulate import poisson_traffic, sweep

TOLERANCE = 0.05
DEEPSEEK_R1: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "vocab_size": 129280,
}
"""The fields of DeepSeek-R1's published config.json that matter here."""

NOT_MODELLED = (
    (
        "kernel breakdown, 21 figures",
        "times of single kernels of TensorRT-LLM, which we do not run",
    ),
    ("by MNT and by ISL/STD, 12 figures", "need the paper's batching of partial prompts"),
    ("group of 3, 4 figures", "256 experts over 3 ranks needs the paper's redundancy, not stated"),
    (
        "contention slicing, 8 figures",
        "need the paper's kernel overlap; we model the pull order",
    ),
    ("SGLang on B200, 3 figures", "another engine, all-gather instead of all-to-all"),
    (
        "end to end, 20 figures",
        "disaggregated deployment whose split and request rates are not stated",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One published figure and ours."""

    source: str
    quantity: str
    published: float
    model: float
    kind: str

    @property
    def error(self) -> float:
        """Relative."""
        return self.model / self.published - 1

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "source": self.source,
            "quantity": self.quantity,
            "published": self.published,
            "model": self.model,
            "kind": self.kind,
        }


def paper_rows() -> list[Row]:
    """All rows, in the order of the paper."""
    return [*_roofline(), *_contention(), *_interference(), *_context_only()]


def _r1(efficiency: Any) -> CostModel:
    return CostModel(
        shape=shape_of(DEEPSEEK_R1, "nvfp4"),
        hardware=find_hardware("gb200"),
        efficiency=efficiency,
        group_size=4,
    )


def _roofline() -> Iterator[Row]:
    model, source = _r1(PEAK), "roofline, DeepSeek-R1 context, GB200 x4, batch 1"
    published = ((1024, 0.19, 0.10), (8192, 0.62, 0.73), (16384, 1.52, 1.27), (32768, 4.77, 1.17))
    for tokens, over_prefetch, dep_over_dwdp in published:
        step = Step.prefill(tokens, tokens)
        compute = model.layer(step, model.shape.num_experts).compute
        yield Row(
            source=source,
            quantity=f"T_compute / T_prefetch, ISL {tokens}",
            published=over_prefetch,
            model=compute / model.prefetch,
            kind="predicted",
        )
        yield Row(
            source=source,
            quantity=f"T_DEP / T_DWDP, ISL {tokens}",
            published=dep_over_dwdp,
            model=model.dep_layer(step) / model.dwdp_layer(step),
            kind="predicted",
        )


def _contention() -> Iterator[Row]:
    published = {
        3: (50, 50),
        4: (44.44, 44.44, 11.11),
        6: (40.96, 40.96, 15.36, 2.56, 0.16),
        8: (39.66, 39.66, 16.52, 3.67, 0.46),
        12: (38.55, 38.55, 17.35, 4.63, 0.81),
        16: (38.06, 38.06, 17.67, 5.05, 0.99),
    }
    for group_size, percents in published.items():
        chances = contention(group_size)
        for count, percent in enumerate(percents, 1):
            yield Row(
                source="contention at a source",
                quantity=f"Pr[C = {count}], {group_size} ranks, %",
                published=percent,
                model=100 * chances[count - 1],
                kind="predicted",
            )


def _interference() -> Iterator[Row]:
    hardware = find_hardware("gb200")
    yield Row(
        source="bound of interference in memory",
        quantity="NVLink both ways over HBM, %",
        published=22.5,
        model=100 * 2 * hardware.link_gbps / hardware.memory_gbps,
        kind="predicted",
    )


def _context_only() -> Iterator[Row]:
    model, source = _r1(DEFAULT), "context only, MNT 32768, lengths 0.8 - 1 of ISL, DWDP4 over DEP4"
    for tokens, ttft, throughput in (
        (1024, 1.27, 1.11),
        (8192, 1.16, 1.10),
        (16384, 1.12, 1.09),
        (32768, 1.11, 1.09),
    ):
        requests = poisson_traffic(
            num_requests=2000 * 32768 // tokens // 8,
            requests_per_s=1e9,
            input_tokens=tokens,
            smallest_share=0.8,
            seed=0,
        )
        outcomes = dict(sweep(model, requests, max_tokens=32768, routing_skew=1.1))
        dep, dwdp = outcomes["DEP"], outcomes["DWDP"]
        yield Row(
            source=source,
            quantity=f"TTFT speed-up, ISL {tokens}",
            published=ttft,
            model=statistics.mean(dep.ttft_s) / statistics.mean(dwdp.ttft_s),
            kind="default",
        )
        yield Row(
            source=source,
            quantity=f"TPS/GPU speed-up, ISL {tokens}",
            published=throughput,
            model=dwdp.tokens_per_s / dep.tokens_per_s,
            kind="default",
        )
