"""The GPU tests without pytest: `python3 -m tests.gpu [--only NAME[:ARGUMENT] ...] [--skip ...]`.

One line per scenario, the end of its output where it fails. Exit status 1 if one failed, if none ran, or
if the time did not suffice for all that was asked for: `NOT RUN` is not passed. Writes each output to
$OUT/gpu-tests.log if that is set.
"""

import argparse
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

from tests.gpu.running import FACTS, Outcome, run_scenario, title_of, why_not
from tests.gpu.scenarios import SCENARIOS

CASES = {
    title_of(scenario, argument): (scenario, argument)
    for scenario, arguments in SCENARIOS.items()
    for argument in arguments
}
SHORTEST_S = 20.0
"""With less time left nothing is begun."""


def chosen(only: list[str], skip: list[str]) -> list[str]:
    """Titles, in the order of `only`; a scenario's name stands for all its arguments."""

    def expand(names: list[str]) -> list[str]:
        return [title for name in names for title in CASES if name in (title, CASES[title][0])]

    return [title for title in expand(only) if title not in expand(skip)]


def report(title: str, outcome: Outcome, seconds: float, *, is_cut: bool) -> str:
    """One line, and the end of the output where that says more; returns the line's first word."""
    if CASES[title][0] in FACTS:
        holds = "holds" if outcome.passed else "hangs" if outcome.timed_out else "does not hold"
        word, how = "fact", f": {holds}"
    elif is_cut:
        word, how = "NOT RUN", ": cut, the budget of time is spent"
    else:
        word, how = "ok" if outcome.passed else "FAIL", ""
    print(f"{word:<7} {title} ({seconds:.0f} s){how}", flush=True)
    if not outcome.passed:
        for line in outcome.output.strip().splitlines()[-15:]:
            print(f"        | {line[:400]}", flush=True)
    return word


def main() -> int:
    names = [*SCENARIOS, *(title for title in CASES if title not in SCENARIOS)]
    parser = argparse.ArgumentParser(description="The GPU tests without pytest.")
    parser.add_argument("--only", nargs="+", choices=names, default=list(SCENARIOS), metavar="NAME")
    parser.add_argument("--skip", nargs="+", choices=names, default=[], metavar="NAME")
    parser.add_argument("--budget-s", type=float, default=7200, help="of all scenarios together")
    options = parser.parse_args()
    deadline = time.monotonic() + options.budget_s
    log = Path(os.environ["OUT"], "gpu-tests.log") if "OUT" in os.environ else None
    found: dict[str, list[str]] = defaultdict(list)
    for title in chosen(options.only, options.skip):
        scenario, argument = CASES[title]
        if reason := why_not(scenario):
            found["skip"].append(title)
            print(f"skip    {title}: {reason}", flush=True)
            continue
        left_s = deadline - time.monotonic()
        if left_s < SHORTEST_S:
            found["NOT RUN"].append(title)
            print(f"NOT RUN {title}: the budget of time is spent", flush=True)
            continue
        outcome = run_scenario(scenario, argument, timeout_s=left_s)
        is_cut = outcome.timed_out and time.monotonic() >= deadline
        seconds = left_s - (deadline - time.monotonic())
        word = report(title, outcome, seconds, is_cut=is_cut)
        found[word].append(title)
        if log is not None:
            with log.open("a") as file:
                file.write(f"=== {title}: {word}\n{outcome.output}\n")
    print(", ".join(f"{len(titles)} {word}" for word, titles in found.items()) or "nothing to run")
    for word in ("FAIL", "NOT RUN", "skip"):
        if found[word]:
            print(f"{word}: {' '.join(found[word])}")
    return 1 if found["FAIL"] or found["NOT RUN"] or not found["ok"] else 0


if __name__ == "__main__":
    sys.exit(main())
