"""Rows about single layers and kernels: roofline, contention, bounds, breakdown, synchronisation."""

from collections.abc import Iterator, Mapping

from vllm_dwdp.paper.factors import FITTED, Row, r1_model, roofline_model, row
from vllm_dwdp.paper.saturated import Lengths, mean_step, synchronisation_seconds
from vllm_dwdp.planner.contention import contention
from vllm_dwdp.planner.cost import CostModel
from vllm_dwdp.planner.hardware import find_hardware
from vllm_dwdp.planner.step import Step

PUBLISHED_VARIATION = 0.20
"""Of the tokens of a rank's step, at which the paper states the synchronisation tax."""

_BREAKDOWN: Mapping[str, Mapping[str, float]] = {
    "DEP4": {"Attention": 269.67, "GroupedGEMM": 342.40, "DenseGEMM": 177.50, "Others": 241.69,
             "Communication": 126.74, "Synchronisation": 161.85, "Iteration": 1319.85},
    "DWDP4 naive": {"Attention": 320.56, "GroupedGEMM": 337.42, "DenseGEMM": 189.28,
                    "Others": 284.32, "Merge copy": 34.00, "P2P copy": 429.00,
                    "Iteration": 1165.58},
    "DWDP4 without merge copy": {"Attention": 320.56, "GroupedGEMM": 337.42, "DenseGEMM": 189.28,
                                 "Others": 284.32, "P2P copy": 429.00, "Iteration": 1131.58},
}  # fmt: skip
"""Milliseconds per step of DeepSeek-R1, ISL 8192, lengths 0.8 - 1, MNT 32768, GB200 x4."""


def roofline() -> Iterator[Row]:
    """[P] T_compute / T_prefetch and T_DEP / T_DWDP, batch 1."""
    model, source = roofline_model(), "roofline, DeepSeek-R1 context, GB200 x4, batch 1"
    published = ((1024, 0.19, 0.10), (8192, 0.62, 0.73), (16384, 1.52, 1.27), (32768, 4.77, 1.17))
    for tokens, over_prefetch, dep_over_dwdp in published:
        step = Step.prefill(tokens, tokens)
        compute = model.layer(step, model.shape.num_experts).compute
        values = {
            "T_compute / T_prefetch": (over_prefetch, compute / model.prefetch),
            "T_DEP / T_DWDP": (dep_over_dwdp, model.dep_layer(step) / model.dwdp_layer(step)),
        }
        for quantity, (seen, ours) in values.items():
            yield row(source, f"{quantity}, ISL {tokens}", seen, ours, "predicted")


def contention_rows() -> Iterator[Row]:
    """[P] How many pulls meet at a source."""
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
            quantity = f"Pr[C = {count}], {group_size} ranks, %"
            ours = 100 * chances[count - 1]
            yield row("contention at a source", quantity, percent, ours, "predicted")


def bounds() -> Iterator[Row]:
    """[P] What copies can cost the compute beside them."""
    hardware = find_hardware("gb200")
    both_ways = 100 * 2 * hardware.link_gbps / hardware.memory_gbps
    quantity = "NVLink both ways over HBM, %"
    yield row("interference in memory", quantity, 22.5, both_ways, "predicted")
    attention, copies, idle = 96.7, 30.5, 12.9
    quantity = f"attention ({attention}) + copies ({copies}) - idle ({idle})"
    yield row("power, % of TDP", quantity, 114.4, attention + copies - idle, "derived")


def breakdown() -> Iterator[Row]:
    """[P] Kernel times of a step, printed as microseconds, plausible as milliseconds."""
    models = {"DEP4": _dep4(), "DWDP4 naive": _dwdp4(merge=True)}
    models["DWDP4 without merge copy"] = _dwdp4(merge=False)
    for column, published in _BREAKDOWN.items():
        for quantity, seen in published.items():
            yield row(f"breakdown, {column}", quantity, seen, 1e3 * models[column][quantity])


def synchronisation() -> Iterator[Row]:
    """[P], [B] Part of a DEP step that ranks wait at 20 % variation of their tokens."""
    parts = _dep4()
    waiting = 100 * parts["Synchronisation"] / parts["Iteration"]
    for source, percent in (("synchronisation tax [P]", 12.0), ("synchronisation tax [B]", 10.0)):
        yield row(source, "waiting in a DEP step, CV 20 %, %", percent, waiting)


def _step() -> Step:
    return mean_step(Lengths(8192, smallest_share=0.8), 32768)


def _kernels(model: CostModel) -> dict[str, float]:
    parts = model.step_seconds(_step())
    return {
        "Attention": parts.attention,
        "GroupedGEMM": parts.experts,
        "DenseGEMM": parts.linear,
        "Others": parts.other,
    }


def _dep4() -> dict[str, float]:
    """Seconds of a DEP step, by row."""
    model, step = r1_model(), _step()
    parts = _kernels(model)
    parts["Communication"] = model.shape.num_moe_layers * model.all_to_all(step)
    parts["Synchronisation"] = synchronisation_seconds(model, step, PUBLISHED_VARIATION)
    parts["Iteration"] = sum(parts.values())
    return parts


def _dwdp4(merge: bool) -> dict[str, float]:
    """Seconds of a DWDP step, by row: what copies cost falls on the compute before the experts."""
    model = r1_model()
    layers = model.shape.num_moe_layers
    parts = _kernels(model)
    before = sum(parts.values()) - parts["GroupedGEMM"]
    slower = 1.0 + layers * model.interference / before
    parts = {
        name: seconds * (1.0 if name == "GroupedGEMM" else slower)
        for name, seconds in parts.items()
    }
    remote_bytes = layers * model.remote_bytes
    memory = model.hardware.memory_gbps * 1e9
    parts["Merge copy"] = FITTED["merge_passes"].value * remote_bytes / memory if merge else 0.0
    return parts | {"Iteration": sum(parts.values()), "P2P copy": layers * model.prefetch}
