"""The questions to a GPU, asked over the fake driver and CPU kernels.

That each is asked and can be answered is tested, not what a GPU would say.

Three runs of the program answer them all: both lists in order, and the rest. What has no stand-in
(graphs and their compiler, the V1 runner on GPUs, the size of a device's memory) is skipped, and nothing
else.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpu_checks.order import FIRST_MINUTES, TWO_GPUS, all_cases
from gpu_checks.questions import CASES

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1500)]

SIMULATED = [title for title, case in CASES.items() if case.can_be_simulated]
Answers = dict[str, dict[str, Any]]


def ask(target: Path, *options: str, **environment: str) -> Answers:
    """Return the program's answers by title; it must succeed."""
    ended = subprocess.run(
        [sys.executable, "-m", "gpu_checks", "--simulated", "--json", str(target), *options],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return {answer["title"]: answer for answer in json.loads(target.read_text())}


LISTS = {"--first-minutes": FIRST_MINUTES, "--two-gpus": TWO_GPUS}
IN_LISTS = [case.title for blocks in LISTS.values() for case in all_cases(blocks)]
SMALL = ("--tokens", "5", "--limit-s", "600")


@pytest.fixture(scope="module")
def in_order(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answers]:
    """Return the answers of both lists."""
    folder = tmp_path_factory.mktemp("lists")
    return {name: ask(folder / f"{name}.json", name, *SMALL) for name in LISTS}


@pytest.fixture(scope="module")
def answers(in_order: dict[str, Answers], tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """Those, and the answers to everything that is in no list."""
    target = tmp_path_factory.mktemp("gpu_checks") / "answers.json"
    found = ask(target, "--jobs", "2", *SMALL, "--skip", *IN_LISTS)
    for listed in in_order.values():
        found |= listed
    return found


@pytest.mark.parametrize("name", LISTS)
def test_a_list_is_asked_in_its_order(name: str, in_order: dict[str, Answers]) -> None:
    assert list(in_order[name]) == [case.title for case in all_cases(LISTS[name])]
    assert {answer["word"] for answer in in_order[name].values()} <= {
        "yes",
        "fact",
        "bench",
        "skip",
    }


@pytest.mark.parametrize("title", SIMULATED)
def test_every_question_is_answered(title: str, answers: Answers) -> None:
    answer = answers[title]
    good = {"must": "yes", "fact": "fact", "bench": "bench"}[answer["tag"]]
    assert answer["answered"] and answer["word"] == good, answer


def test_nothing_is_skipped_but_what_has_no_stand_in(answers: Answers) -> None:
    skipped = {title for title, answer in answers.items() if answer["word"] == "skip"}
    assert skipped == set(CASES) - set(SIMULATED)
    assert skipped == {"graph_seam", "kv_sizing", "executors"} | {
        title
        for title in CASES
        if title.startswith("engines:") and title not in ("engines:fp8", "engines:auto_default")
    }


@pytest.mark.parametrize(
    ("title", "said"),
    [
        ("which_device", "NOT A GPU"),
        ("digest", "the same"),
        ("mixed_access", "read-only, one call for both: accepted"),
        ("fault_spread", "peers read on"),
        ("batch_copy_under_capture", "returned 900"),
        ("read_only_peers", "ILLEGAL_ADDRESS"),
        ("batch_copy_under_capture", "a replay brings the copy before it, the copy after it"),
        ("value_nodes", "every layer is right"),
        ("copy_speed", "CUDA driver 13.0"),
        ("issue_blocked", "60 copies in waves of three"),
        ("capture_nodes", "50 nodes: captured in"),
        ("capture_misuse", "every misuse is refused"),
    ],
)
def test_the_fake_is_seen_as_it_is(title: str, said: str, answers: Answers) -> None:
    assert said in answers[title]["text"]


@pytest.mark.parametrize("title", [title for title in CASES if title.startswith("steps:")])
def test_a_benchmark_gives_the_bits_of_resident_weights(title: str, answers: Answers) -> None:
    (row,) = answers[title]["rows"]
    assert row["tokens"] == 5 and all(row["same"].values())
    assert {name.split()[0] for name in row["ms"]} == {"resident", "prefetch", "merge", "join"}
    assert row["copies"]["bytes"] > 0 and row["host_us"]["slices"] > 0, "nothing was fetched"
    assert row["host_us"]["issue"] > 0
