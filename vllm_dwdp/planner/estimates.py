"""What `plan` estimates: memory, break-even, gains over DEP in parts, crossover, redundancy. Pure."""

import random
import statistics
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache

from vllm_dwdp.planner.cost import COMBINE_BITS, CostModel
from vllm_dwdp.planner.memory import KV_RESERVE, USABLE_MEMORY, memory_bytes
from vllm_dwdp.planner.step import Step
from vllm_dwdp.planner.traffic import Traffic
from vllm_dwdp.prefetch.mode_policy import LARGEST_STEP, LayerCosts

ROUTING_SKEW = 1.1
"""Load of the busiest expert-parallel rank over the mean; an assumption."""


PROMPT_TOKENS = 8192
"""Of a prompt, where the user gives no length."""


_ROUNDING = 1e-9


LINK = ("link",)


LINEAR = ("dense_gemm", "attention", "other_passes")


EXPERTS = ("grouped_gemm", "memory")


COMPUTE = (*LINEAR, *EXPERTS)


EVERYTHING = (*COMPUTE, *LINK, "beside_copies")
"""Efficiencies that figures use (`hardware.Efficiency`)."""


class Part(Enum):
    """One part of the difference between a DEP step and a DWDP step.

    Args:
        title: for tables and pictures.
        uses: the efficiencies that it rests on.
        assumed: it also rests on `assumptions`.
    """

    ALL_TO_ALL = ("all-to-all saved", LINK, True)
    LENGTHS = ("synchronisation saved, lengths", LINEAR)
    SKEW = (f"synchronisation saved, routing skew {ROUTING_SKEW}", EXPERTS, True)
    IN_PLACE = ("reading peers in place", (*COMPUTE, "direct"))
    INTERFERENCE = ("interference of copies", ("beside_copies", *LINK))
    EXPOSED = ("exposed prefetch", EVERYTHING)
    EXPERT_READS = ("experts read once per rank, not once per group", EXPERTS, True)

    def __init__(self, title: str, uses: tuple[str, ...], assumed: bool = False) -> None:
        self.title, self.uses, self.assumed = title, uses, assumed


class Decode(Enum):
    """One way to run a decode step: its title, and the efficiencies that its time rests on."""

    PREFETCH = ("DWDP prefetch", EVERYTHING)
    DIRECT = ("DWDP direct", (*COMPUTE, "direct"))
    DEP = ("DEP balanced", (*COMPUTE, *LINK))
    REPLICA = ("full replica", COMPUTE)

    def __init__(self, title: str, uses: tuple[str, ...]) -> None:
        self.title, self.uses = title, uses


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A number of tokens per step and rank, or what to say where there is none.

    Args:
        number: None if `instead` says why.
    """

    number: int | None
    instead: str = ""


ALWAYS = Tokens(number=None, instead="any step")


def layer_costs(model: CostModel, input_tokens: float) -> LayerCosts:
    """Describe an MoE layer of steps of prompts for the policy that chooses direct or prefetch.

    The engine chooses by the same costs, with the speeds that it measured. Of layers that have different
    numbers of dense layers beside their copies, it is one with the fewest.

    Args:
        model: some of its experts are remote.
    """
    shape, num_dense = model.shape, min(beside for beside, _ in model.shape.dense_beside)
    link = model.hardware.link_gbps * 1e9

    def compute_seconds(num_tokens: int) -> float:
        step = Step.prefill(num_tokens, input_tokens)
        moe = model.layer(step, shape.num_experts).compute
        return moe + (num_dense * model.dense_layer(step).compute if num_dense else 0.0)

    return LayerCosts(
        num_experts=shape.num_experts,
        num_remote_experts=shape.num_experts - model.resident_experts,
        experts_per_token=shape.experts_per_token,
        remote_bytes=model.remote_bytes,
        copy_bytes_per_s=link * model.efficiency.link,
        direct_bytes_per_s=link * model.efficiency.direct,
        compute_seconds=compute_seconds,
        beside_copies=model.efficiency.beside_copies,
    )


def break_even_tokens(model: CostModel, input_tokens: int) -> Tokens:
    """Find the smallest prefill step that computes long enough to hide its copies."""
    if model.remote_bytes == 0:
        return Tokens(number=None, instead="does not apply: every expert is resident")
    if direct_crossover(model) == ALWAYS:
        return Tokens(number=None, instead="does not apply: reading in place always wins")
    if model.efficiency.beside_copies == 0:
        return Tokens(number=None, instead="does not apply: compute stops beside copies")
    found = layer_costs(model, input_tokens).break_even_tokens
    instead = f"never: not up to {LARGEST_STEP:,} tokens" if found is None else ""
    return Tokens(number=found, instead=instead)


def exposed_seconds(model: CostModel, step: Step) -> float:
    """Return the seconds that a DWDP step in prefetch mode waits for its copies."""
    interference, whole_step = (
        model.shape.num_moe_layers * model.interference,
        model.dwdp_step(step),
    )
    waited = whole_step - interference - model.step_seconds(step).compute
    return waited if waited > _ROUNDING * whole_step else 0.0


def direct_step(model: CostModel, step: Step) -> float:
    """Time a DWDP step that reads its remote experts in place, as its kernels get to them."""
    touched = model.touched_experts(step.num_tokens, model.shape.num_experts)
    remote = touched * (1.0 - model.resident_experts / model.shape.num_experts)
    link = model.hardware.link_gbps * 1e9 * model.efficiency.direct
    layer = model.layer(step, model.resident_experts).compute
    layer += remote * model.shape.expert_bytes / link
    return model.shape.num_moe_layers * layer + model.dense_layers(step).compute


def reads_in_place(model: CostModel, step: Step) -> bool:
    """Say whether mode `auto` reads in place in such a step."""
    crossover = direct_crossover(model)
    return crossover == ALWAYS or step.num_tokens <= (crossover.number or 0)


def auto_step(model: CostModel, step: Step) -> float:
    """Time a DWDP step in mode `auto`."""
    return (direct_step if reads_in_place(model, step) else CostModel.dwdp_step)(model, step)


@lru_cache(maxsize=64)
def synchronisation(group_size: int, variation: float, seed: int = 0) -> float:
    """Draw the busiest rank's tokens over the mean rank's: what every DEP step waits for."""
    if variation == 0 or group_size == 1:
        return 1.0
    dice = random.Random(seed)
    half_width = min(1.0, variation * 3**0.5)
    ratios = []
    for _ in range(min(2000, max(1, 400_000 // group_size))):
        loads = [dice.uniform(1 - half_width, 1 + half_width) for _ in range(group_size)]
        ratios.append(max(loads) / statistics.mean(loads))
    return statistics.mean(ratios)


def parts(model: CostModel, traffic: Traffic) -> dict[Part, float]:
    """Return the seconds per full prefill step that DWDP saves (or loses, if negative) over DEP.

    They add up to the difference of the two steps with uneven lengths and routing.
    """
    step, layers = traffic.prefill_step, model.shape.num_moe_layers
    own, shared = model.layer(step, model.shape.num_experts), model.dep_compute(step)
    waiting = synchronisation(model.group_size, traffic.variation) - 1
    before = layers * own.before_experts + model.dense_layers(step).compute
    return {
        Part.ALL_TO_ALL: layers * model.all_to_all(step),
        Part.LENGTHS: waiting * before,
        Part.SKEW: (ROUTING_SKEW - 1) * layers * shared.experts,
        **_cost_of_remote_experts(model, step),
        Part.EXPERT_READS: layers * (shared.experts - own.experts),
    }


def _cost_of_remote_experts(model: CostModel, step: Step) -> dict[Part, float]:
    if reads_in_place(model, step):
        in_place = model.step_seconds(step).compute - direct_step(model, step)
        return {Part.IN_PLACE: in_place}
    return {
        Part.INTERFERENCE: 0.0 - model.shape.num_moe_layers * model.interference,
        Part.EXPOSED: 0.0 - exposed_seconds(model, step),
    }


def speedups(model: CostModel, traffic: Traffic) -> dict[str, float]:
    """Return DEP seconds over DWDP seconds of a full prefill step: balanced, with lengths, with skew."""
    saved = parts(model, traffic)
    dwdp = auto_step(model, traffic.prefill_step)
    lengths, skew = saved.pop(Part.LENGTHS), saved.pop(Part.SKEW)
    balanced = dwdp + sum(saved.values())
    return {
        "balanced": balanced / dwdp,
        "with varying lengths": (balanced + lengths) / dwdp,
        "with routing skew too": (balanced + lengths + skew) / dwdp,
    }


def direct_crossover(model: CostModel) -> Tokens:
    """Return the most tokens of a step that reads in place in mode `auto`."""
    if model.remote_bytes == 0:
        return Tokens(number=0)
    reached = model.efficiency
    if reached.beside_copies == 0 and reached.direct >= reached.link:
        return ALWAYS  # the host device: a copy takes the core that computes
    return Tokens(number=layer_costs(model, PROMPT_TOKENS).direct_max_tokens)


def decode_steps(model: CostModel, step: Step) -> dict[Decode, float]:
    """Return the seconds of a decode step in each mode and deployment."""
    return {
        Decode.PREFETCH: model.dwdp_step(step),
        Decode.DIRECT: direct_step(model, step),
        Decode.DEP: model.dep_step(step),
        Decode.REPLICA: model.step_seconds(step).compute,
    }


def assumptions(model: CostModel) -> list[str]:
    """Say what figures rest on that was not measured."""
    forms = [form for form, _ in model.shape.expert_precision.parts]
    dequantised = [f for f in forms if f.bits < 16 and model.hardware.product_bits(f) == 16]
    said = [
        f"Expert parallelism sends {model.dispatch_bits:.3g} bits per hidden element to an expert "
        f"(what its products run in) and {COMBINE_BITS:g} back; routing is uniform but for a busiest "
        "rank where its skew is named.",
        f"vLLM uses {100 * USABLE_MEMORY:.0f} % of the memory.",
    ]
    if model.hardware.num_gpus > 1:
        said.append(
            f"The {model.hardware.num_gpus} GPUs of a rank divide all that it does evenly, and their "
            "all-reduces take no time, with DWDP as with expert parallelism."
        )
    if dequantised:
        said.append(
            f"Experts in {dequantised[0].bits:.4g} bits are dequantised in their kernel on "
            f"{model.hardware.name}, so their products run at the bf16 peak."
        )
    return said


def redundancy(model: CostModel, traffic: Traffic) -> tuple[int, float, Tokens]:
    """Return the experts that spare memory holds per layer, the copies saved, the break-even."""
    spare_bytes = memory_bytes(model).kv_cache - KV_RESERVE * model.hardware.memory_gb * 1e9
    num_remote = model.shape.num_experts - model.resident_experts
    per_layer = model.shape.num_banks * model.shape.layer_expert_bytes
    spare = min(num_remote, int(max(0.0, spare_bytes) // per_layer))
    richer = replace(model, extra_experts=model.extra_experts + spare)
    saved = spare / num_remote if num_remote else 0.0
    return spare, saved, break_even_tokens(richer, traffic.input_tokens)
