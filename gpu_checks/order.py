"""In which order a machine that is lent for minutes is asked, and when to stop. Pure: needs no torch.

A list is made of blocks. A `NO` ends its block, and no block that builds on it is begun: what they would
say could not be read. Every step has a budget in seconds, start of its process included, which ends it.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from gpu_checks.asking import Result, ask
from gpu_checks.questions import NAMES, Case, choose


@dataclass(frozen=True)
class Step:
    """A question by name (with all its arguments, one after the other) or title.

    Args:
        budget_s: of all its answers together.
    """

    name: str
    budget_s: int

    @property
    def cases(self) -> list[Case]:
        """What is asked."""
        return choose([self.name], [])


@dataclass(frozen=True)
class Block:
    """Questions that decide one thing.

    Args:
        name: shown, and named by others.
        decides: what its answers are for.
        builds_on: earlier blocks without which its answers mean nothing.
    """

    name: str
    decides: str
    steps: tuple[Step, ...]
    builds_on: tuple[str, ...] = ()

    @property
    def budget_s(self) -> int:
        """Of all steps."""
        return sum(step.budget_s for step in self.steps)


# fmt: off
FIRST_MINUTES = (
    Block("memory", "whether virtual memory is as we think", (
        Step("which_device", 25), Step("read_only_peers", 30), Step("torch_on_composites", 25),
        Step("digest", 25), Step("moe_outputs", 50), Step("killed_exporter", 25))),
    Block("issue", "how large a copy must be, and whether a thread of its own must issue it", (
        Step("issue_blocked", 180),), ("memory",)),
    Block("copies", "the flag of copies within one GPU, and `slice_bytes`", (
        Step("long_copies", 30), Step("copy_speed", 90)), ("memory",)),
    Block("nodes", "whether graphs may hold copies", (
        Step("capture_nodes", 180),), ("memory",)),
    Block("order", "whether events order copies and kernels, in every mode", (
        Step("graph_seam", 25), Step("driver_ring", 40), Step("races:eager", 35),
        Step("races:piecewise", 35), Step("races:full", 35), Step("no_join", 40),
        Step("batch_copy_under_capture", 30)), ("memory",)),
    Block("value nodes", "whether graphs may wait for copies that the host issues", (
        Step("value_nodes", 180),), ("memory",)),
    Block("tokens", "whether engines answer as stock vLLM does", (
        Step("vllm_generates", 100), Step("engines:eager", 190), Step("engines:full", 190)),
        ("memory", "order")),
    Block("compiled", "the same through torch.compile and its graphs", (
        Step("engines:piecewise", 210), Step("engines:default", 210)), ("tokens",)),
    Block("variants", "quantised experts, asynchronous scheduling, and what `auto` chooses by itself", (
        Step("engines:fp8", 100), Step("engines:async", 100), Step("engines:auto_default", 100)),
        ("tokens",)),
    Block("sizing", "whether shards, slots and the KV cache share the memory", (
        Step("kv_sizing", 150), Step("a_rank_returns", 150)), ("tokens",)),
    Block("overlap", "whether a copy engine hides copies behind kernels", (
        Step("steps:qwen3-30b-a3b-bf16-host", 120),), ("memory", "order")),
)
"""45 minutes of one H100."""

TWO_GPUS = (
    Block("reach", "whether a rank reads a peer's GPU, also one that it does not see", (
        Step("peers_apart", 40), Step("mixed_access", 30))),
    Block("in place", "what `direct` costs over a link", (
        Step("in_place_speed", 60), Step("reread_speed", 60)), ("reach",)),
    Block("pulls", "`slice_bytes`, and what peers lose who pull at once", (
        Step("peer_copy_speed", 120),), ("reach",)),
    Block("faults", "what a fault of one GPU's process does to its peers", (
        Step("fault_spread", 60),), ("reach",)),
)
"""The first six minutes of a machine with two GPUs, before ranks of vLLM run there."""
# fmt: on

WhyNot = Callable[[Case], str]


def ask_in_order(
    blocks: Sequence[Block],
    deadline: float,
    why_not: WhyNot,
    announce: Callable[[str], None],
    limit_s: float | None = None,
) -> Iterator[Result]:
    """Yield every result, one question at a time.

    Args:
        deadline: of everything, by `time.monotonic`.
        why_not: says why a case cannot be asked here.
        announce: is told of each block before it begins.
        limit_s: of each answer, instead of its own limit and its step's budget.
    """
    stopped: dict[str, str] = {}
    for block in blocks:
        reason = next((stopped[name] for name in block.builds_on if name in stopped), "")
        announce(
            f"block {block.name}: {block.decides}" + (f"; left out: {reason}" if reason else "")
        )
        for step in block.steps:
            cases = [case.limited_to(limit_s) if limit_s else case for case in step.cases]
            budget_s = limit_s * len(cases) if limit_s else step.budget_s
            until = min(deadline, time.monotonic() + budget_s)
            for case in cases:
                result = _ask_one(case, until, reason, why_not(case), budget_s)
                yield result
                if result.word == "NO":
                    reason = f"{result.title} of block {block.name} is a NO"
        if reason:
            stopped[block.name] = reason


def _ask_one(case: Case, until: float, reason: str, missing: str, budget_s: float) -> Result:
    if reason:
        return Result.of(case).end("NOT RUN", reason)
    if missing:
        return Result.of(case).end("skip", missing)
    (result,) = ask([case], until)
    if result.word == "NOT RUN":
        result.text = f"its budget of {budget_s:.0f} s, or that of everything, is spent"
    return result


def all_cases(blocks: Sequence[Block]) -> list[Case]:
    """Everything that is asked, in order."""
    return [case for block in blocks for step in block.steps for case in step.cases]


def missing_names(blocks: Sequence[Block]) -> set[str]:
    """Return the names of steps that no question has."""
    return {step.name for block in blocks for step in block.steps} - NAMES
