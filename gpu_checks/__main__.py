"""Ask a GPU what vllm-dwdp needs of it: `python -m gpu_checks`, in a checkout.

    --first-minutes                  45 minutes of one GPU, most valuable first (`gpu_checks/order.py`)
    --two-gpus                       the first minutes of a machine that has two
    --only races:full leaks bench    titles, names with all their arguments, or a tag
    --budget-s 300                   what was not begun in this time is NOT RUN
    --list                           every question, with its tag and its rough cost

Prints a line as each answer comes. `yes` and `NO` answer what our code must do, `fact` is what the
hardware does, whatever it is, `bench` is a measurement; `skip` lacks a package, `NOT RUN` lacks time
and is no pass. Exits 1 if there is a NO or a NOT RUN, or no answer at all.

Needs torch; for some questions Triton, msgspec or vLLM. Nothing here has run on a GPU (docs/gpu.md).
"""

import argparse
import contextlib
import ctypes
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

from gpu_checks.asking import Result, ask
from gpu_checks.fake import SIMULATED_ENV, simulated_environment
from gpu_checks.order import FIRST_MINUTES, TWO_GPUS, all_cases, ask_in_order
from gpu_checks.questions import NAMES, Case, choose


def main() -> int:
    """Ask what was chosen and return the exit status."""
    options = parse()
    blocks = FIRST_MINUTES if options.first_minutes else TWO_GPUS if options.two_gpus else ()
    cases = all_cases(blocks) if blocks else choose(options.only, options.skip)
    if options.limit_s:
        cases = [case.limited_to(options.limit_s) for case in cases]
    if options.list:
        for block in blocks:
            print(f"block {block.name}: {block.decides} ({block.budget_s} s)")
            print_list(all_cases([block]))
        if not blocks:
            print_list(cases)
        return 0
    if options.simulated:
        os.environ |= simulated_environment()
    if not has_gpu():
        return 1
    os.environ["GPU_CHECKS_BENCH"] = json.dumps(
        {
            "tokens": options.tokens,
            "rounds": options.rounds,
            "torch_kernel": options.torch_kernel,
            "profile": options.profile and str(options.profile.resolve()),
        }
    )
    print(describe_machine(), flush=True)
    deadline = time.monotonic() + options.budget_s
    asked = (
        ask_in_order(blocks, deadline, why_not, announce, options.limit_s)
        if blocks
        else ask_all(cases, deadline, options.jobs)
    )
    results: list[Result] = []
    for result in asked:
        results.append(result)
        report(result)
        if options.json:
            listed = [each.as_json() for each in results]
            options.json.write_text(json.dumps(listed, indent=1))
    return conclude(results)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="gpu_checks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choice = {"nargs": "+", "choices": sorted(NAMES), "default": [], "metavar": "NAME"}
    order = parser.add_mutually_exclusive_group()
    order.add_argument("--first-minutes", action="store_true", help="a list with budgets")
    order.add_argument("--two-gpus", action="store_true", help="likewise, for two GPUs")
    order.add_argument("--only", **choice)  # type: ignore[arg-type]
    parser.add_argument("--skip", **choice)  # type: ignore[arg-type]
    parser.add_argument("--budget-s", type=float, default=7200, help="of everything together")
    parser.add_argument("--jobs", type=int, default=3, help="questions asked at a time")
    parser.add_argument("--list", action="store_true", help="list the questions and ask none")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every answer there")
    parser.add_argument(
        "--simulated", action="store_true", help="over the fake driver: says nothing about a GPU"
    )
    parser.add_argument("--limit-s", type=float, help="of each answer, instead of its own limit")
    bench = parser.add_argument_group("benchmarks")
    bench.add_argument("--tokens", nargs="+", type=int, help="instead of each case's own")
    bench.add_argument("--rounds", type=int, help="of each measurement")
    bench.add_argument("--torch-kernel", action="store_true", help="not vLLM's, even if it works")
    bench.add_argument("--profile", type=Path, metavar="FOLDER", help="write traces there")
    return parser.parse_args()


def print_list(cases: Sequence[Case]) -> None:
    """Print one line per case."""
    for case in cases:
        question = case.question
        print(f"{question.tag:<6}{case.title:<34}{question.cost_s:>4} s  {question.text}")


def describe_machine() -> str:
    """Say which driver, CUDA and torch everything below was found with."""
    import torch

    if is_simulated():
        return f"NOT A GPU: the fake driver and CPU kernels, torch {torch.__version__}"
    found = re.search(r"Module\s+([\d.]+)", read_text("/proc/driver/nvidia/version"))
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return (
        f"driver {found[1] if found else 'unknown'}, CUDA {version.value // 1000}."
        f"{version.value % 1000 // 10}, torch {torch.__version__} for CUDA {torch.version.cuda}; "
        f"{len(names)} GPUs: {', '.join(names)}"
    )


def read_text(path: str) -> str:
    """Return a file's text, or nothing if there is none."""
    with contextlib.suppress(OSError):
        return Path(path).read_text()
    return ""


def num_gpus() -> int:
    """Return how many GPUs questions find; the fake driver has two."""
    if is_simulated():
        return 2
    import torch

    return int(torch.cuda.device_count())


def is_simulated() -> bool:
    """Return whether children find the fake driver."""
    return os.environ.get(SIMULATED_ENV) == "1"


def has_gpu() -> bool:
    """Return whether anything can be asked; say why if not."""
    if importlib.util.find_spec("torch") is None:
        print("torch is not installed; nothing was asked.")
        return False
    import torch

    if not is_simulated() and not torch.cuda.is_available():
        print(f"There is no GPU here (torch {torch.__version__}); nothing was asked.")
        return False
    return True


def why_not(case: Case) -> str:
    """Say why a case cannot be asked here; empty if it can."""
    if is_simulated() and not case.can_be_simulated:
        return "nothing here stands for a GPU's part in it"
    if importlib.util.find_spec(case.question.needs) is None:
        return f"{case.question.needs} is not installed"
    if case.question.num_gpus > 1 and (seen := num_gpus()) < case.question.num_gpus:
        return f"it needs {case.question.num_gpus} GPUs, and {seen} can be seen"
    return ""


def ask_all(cases: Sequence[Case], deadline: float, jobs: int) -> Iterator[Result]:
    """Yield every result: those that may share the device first, then the others one by one."""
    possible = []
    for case in cases:
        if reason := why_not(case):
            yield Result.of(case).end("skip", reason)
        else:
            possible.append(case)
    together = [case for case in possible if not case.question.alone]
    with ThreadPoolExecutor(jobs) as pool:
        for found in pool.map(lambda case: list(ask([case], deadline)), together):
            yield from found
    alone = (case for case in possible if case.question.alone)
    for question, group in groupby(alone, key=lambda case: case.question):
        each = list(group)
        for batch in [each] if question.shares_process else [[case] for case in each]:
            yield from ask(batch, deadline)


def announce(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def report(result: Result) -> None:
    """Print what was found, and the end of the output where that says more."""
    print(
        f"{result.word:<7} {result.title} ({result.seconds:.0f} s) {result.question}\n"
        f"        {result.text}",
        flush=True,
    )
    if not result.answered:
        for line in result.output.strip().splitlines()[-15:]:
            print(f"        | {line[:400]}", flush=True)


def conclude(results: Sequence[Result]) -> int:
    """Print the measurements and the totals, and return the exit status."""
    if rows := [row for result in results for row in result.rows]:
        from gpu_checks.bench_table import print_tables

        print_tables(rows)
    found: dict[str, list[str]] = {}
    for result in results:
        found.setdefault(result.word, []).append(result.title)
    print(", ".join(f"{len(titles)} {word}" for word, titles in found.items()) or "nothing to ask")
    for word in ("NO", "NOT RUN", "skip"):
        if word in found:
            print(f"{word}: {' '.join(found[word])}")
    answered = any(result.answered for result in results)
    return 1 if "NO" in found or "NOT RUN" in found or not answered else 0


if __name__ == "__main__":
    sys.exit(main())
