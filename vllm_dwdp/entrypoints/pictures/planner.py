"""The pictures of `plan` and `simulate`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from vllm_dwdp.entrypoints.pictures.figures import Bar, Bars, Lines, Picture
from vllm_dwdp.paper import TOLERANCE, Row, chunk_curve
from vllm_dwdp.planner.cost import CostModel
from vllm_dwdp.planner.estimates import Part, auto_step, break_even_tokens, parts, speedups
from vllm_dwdp.planner.simulate import Outcome
from vllm_dwdp.planner.traffic import Traffic

_NUM_POINTS = 400
_SMALLEST = 256
NEAR = 0.02


def plan_pictures(model: CostModel, traffic: Traffic) -> list[Picture]:
    """Show the gain over DEP by the size of a step, and where it comes from."""
    needed = break_even_tokens(model, traffic.input_tokens).number
    largest = 4 * max(needed or 0, traffic.max_num_batched_tokens, _SMALLEST)
    sizes = [round(2 ** (k / 8)) for k in range(8 * 20) if _SMALLEST <= 2 ** (k / 8) <= largest]
    gains = [speedups(model, replace(traffic, max_num_batched_tokens=size)) for size in sizes]
    wins = next((size for size, gain in zip(sizes, gains, strict=True) if _best(gain) >= 1), None)
    said = f"wins from {wins:,} tokens per step on" if wins else "wins at no size of a step"
    lines = Lines(
        title=f"{_title(model)}: under uneven load DWDP {said}",
        x_label="tokens per prefill step and rank (K: 1,024)",
        y_label=f"throughput over DEP ({model.efficiency.origin(assumed=True)})",
        series={name: (sizes, [gain[name] for gain in gains]) for name in gains[0]},
        marks=({f"break-even, {needed:,}": float(needed)} if needed else {})
        | {"max_num_batched_tokens": float(traffic.max_num_batched_tokens)},
        level=1.0,
        log_x=True,
    )
    return [lines, _gain_bars(model, traffic)]


def _title(model: CostModel) -> str:
    name = model.shape.name.removesuffix("ForCausalLM").removesuffix("ForConditionalGeneration")
    return f"{name} on {model.group_size} x {model.hardware.name}"


def _best(gain: Mapping[str, float]) -> float:
    return max(gain.values())


def _gain_bars(model: CostModel, traffic: Traffic) -> Bars:
    values, dwdp = speedups(model, traffic), auto_step(model, traffic.prefill_step)
    low, high = min(values.values()), max(values.values())
    return Bars(
        title=f"Prefill with {traffic.max_num_batched_tokens:,} tokens: DWDP is {low:.2f} to "
        f"{high:.2f}x as fast as DEP",
        x_label="saved over DEP, % of a DWDP step",
        bars=[
            Bar(
                label="expert reads" if part is Part.EXPERT_READS else part.title,
                value=100 * seconds / dwdp,
                group="gain" if seconds >= 0 else "loss",
            )
            for part, seconds in parts(model, traffic).items()
        ],
    )


def ttft_pictures(model: CostModel, outcomes: Mapping[str, Outcome]) -> list[Picture]:
    """Show the distribution of the time to first token of each deployment."""
    series = {}
    for name, outcome in outcomes.items():
        ordered = sorted(outcome.ttft_s)
        picked = [
            round(point * (len(ordered) - 1) / (_NUM_POINTS - 1)) for point in range(_NUM_POINTS)
        ]
        shares = [100 * (index + 1) / len(ordered) for index in picked]
        series[name] = ([ordered[index] for index in picked], shares)
    p99 = {name: outcome.percentile(99) for name, outcome in outcomes.items()}
    said = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in p99.items())
    return [
        Lines(
            title=f"{_title(model)}, simulated: P99 time to first token {said}",
            x_label="time to first token, s",
            y_label="requests answered within it, %",
            series=series,
        )
    ]


def paper_pictures(rows: Sequence[Row]) -> list[Picture]:
    """Show the error of every row that is not near."""
    shown = [row for row in rows if abs(row.error) >= NEAR]
    within = sum(row.is_reached for row in rows)
    return [
        Bars(
            title=f"{within} of {len(rows)} published figures are within {100 * TOLERANCE:.0f} % "
            f"(shown: those more than {100 * NEAR:.0f} % away)",
            x_label="model over published, %; the band is the tolerance",
            bars=[
                Bar(
                    label=f"{_short(row.source)}: {row.quantity}",
                    value=100 * row.error,
                    group=row.kind,
                )
                for row in shown
            ],
            band=(-100 * TOLERANCE, 100 * TOLERANCE),
        )
    ]


def chunk_picture(input_tokens: int = 16384) -> Lines:
    """Show the chunk curve of another machine, the model's and the published one."""
    series = chunk_curve(input_tokens)
    wins = next(chunk for chunk, gain in zip(*series["model"], strict=True) if gain >= 1)
    return Lines(
        title=f"DeepSeek-R1 on eight MI355X, prompts of {input_tokens:,} tokens: DWDP needs chunks of "
        f"about {wins / 1024:.0f}K tokens",
        x_label="max_num_batched_tokens (K: 1,024)",
        y_label="prefill throughput over DEP",
        series=series,
        level=1.0,
        log_x=True,
    )


def _short(source: str) -> str:
    """Leave out the deployment, where the first words name the table."""
    return source.split(",", maxsplit=1)[0] if source.startswith(("roofline", "SGLang")) else source
