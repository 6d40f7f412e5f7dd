"""The text of the tables, from rows and results; pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.e2e.models import UNTRIED
from tests.tables.gpu import CHECK, WAITS_FOR_A_GPU
from tests.tables.rows import Row

Results = Mapping[str, Mapping[str, Any]]
"""By version of vLLM: `tests` (how each ended), `date`, `machine`, `counts` and so on."""

MADE = (
    "<!-- Made by `make tables` from the marks and the results of the tests; see tests/tables. -->"
)
SHOWN = {"passed": "yes", "failed": "FAILED", "skipped": "not here", "": "-"}
WORST_FIRST = ("failed", "", "skipped", "passed")
TITLES = {
    "feature": "# vLLM's features, with DWDP",
    "model": "# Models that run with DWDP",
}
NOTES = {
    "model": "Checkpoints are small, with random weights. A row that ends in `... in torch` ran with "
    "that operation, which vLLM has for GPUs only, in plain torch, in stock vLLM and with DWDP alike "
    "(`tests/helpers/missing_kernels`); what stock vLLM says without it is below. `... mended`: so was "
    "what vLLM has wrong on every device. `in Triton's interpreter`: stock vLLM has Triton kernels for "
    "it and runs on a CPU where there is a Triton, of which PyPI has the interpreter only "
    "(`tests/helpers/triton_interpreter`)."
}
FILES = {"feature": "features.md", "model": "models.md"}


@dataclass(frozen=True)
class Entry:
    """One row of a table: its tests, and how they ended with each version.

    Args:
        sentences: that the tests look for, of a row that is refused or that stock vLLM cannot do.
        outcomes: by version; the empty text where a test has not run.
        reasons: of tests that were skipped.
    """

    name: str
    kind: str
    sentences: tuple[str, ...]
    places: tuple[str, ...]
    outcomes: Mapping[str, str]
    reasons: tuple[str, ...]

    @property
    def is_true(self) -> bool:
        """Whether it was seen with one version at least, and with none it failed."""
        ended = set(self.outcomes.values())
        return "passed" in ended and "failed" not in ended


def entries(rows: Iterable[Row], table: str, results: Results) -> list[Entry]:
    """Return the rows of one table in the order of their names, each once for each of its kinds."""
    grouped: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.table == table:
            grouped.setdefault((row.name, row.kind), []).append(row)
    made = []
    for (name, kind), each in sorted(grouped.items(), key=lambda item: item[0][0].lower()):
        tests = [row.test for row in each]
        made.append(
            Entry(
                name=name,
                kind=kind,
                sentences=tuple(dict.fromkeys(row.sentence for row in each if row.sentence)),
                places=tuple(dict.fromkeys(row.place for row in each)),
                outcomes={version: worst(tests, results[version]) for version in results},
                reasons=tuple(reasons(tests, results)),
            )
        )
    return made


def worst(tests: Sequence[str], result: Mapping[str, Any]) -> str:
    """How the tests of a row ended with one version; tests that never run with it do not count."""
    ended = {result["tests"].get(test, {}).get("outcome", "") for test in tests}
    if ended != {""} and not result.get("is_main"):
        ended -= {""}  # tests that are not for every version
    return next(outcome for outcome in WORST_FIRST if outcome in ended)


def reasons(tests: Sequence[str], results: Results) -> list[str]:
    """Why tests of a row were skipped."""
    found = [
        result["tests"].get(test, {}).get("reason", "")
        for result in results.values()
        for test in tests
    ]
    return [reason for reason in dict.fromkeys(found) if reason]


def render(table: str, rows: Sequence[Row], results: Results) -> str:
    """Return the text of docs/features.md or docs/models.md."""
    found = entries(rows, table, results)
    true = [entry for entry in found if entry.is_true]
    versions = list(results)
    parts = [TITLES[table], MADE, _introduction(results), NOTES.get(table, "")]
    parts += _section("## Works", "", [e for e in true if e.kind == "works"], versions, "")
    parts += _section(
        "## Refused",
        "Before anything starts, or at the request, with this sentence:",
        [e for e in true if e.kind == "refused"],
        versions,
        "sentence",
    )
    parts += _section(
        "## Not with stock vLLM either",
        "On this processor, stock vLLM ends with this error; the test fails when it no longer does:",
        [e for e in true if e.kind == "stock_fails"],
        versions,
        "error",
    )
    parts.append(_gpu() if table == "feature" else _untried())
    parts += _section(
        "## Not shown",
        "Tests of these rows have not passed in a recorded run:",
        [e for e in found if not e.is_true],
        versions,
        "why",
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def _introduction(results: Results) -> str:
    of_which = "; ".join(
        f"{version}: {result.get('date')}, {result.get('machine')}"
        for version, result in results.items()
    )
    return (
        "Each row is made true by tests: `yes` says that all of them passed with that version of vLLM, "
        "or all that ran with the second one; `-` that none has run with it.\n"
        f"Last runs: {of_which}. [Versions](versions.md) has more."
    )


def _section(
    title: str, text: str, found: Sequence[Entry], versions: Sequence[str], third: str
) -> list[str]:
    if not found:
        return []
    columns = ["row", *([third] if third else []), "test", *versions]
    lines = [_line(columns), _line("---" for _ in columns)]
    for entry in found:
        shown = [SHOWN[entry.outcomes[version]] for version in versions]
        told = "; ".join(entry.sentences or entry.reasons)
        middle = [told] if third else []
        lines.append(_line([entry.name, *middle, _links(entry.places), *shown]))
    return [title, text, "\n".join(lines)]


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def _links(places: Iterable[str]) -> str:
    links = []
    for place in places:
        path, _, function = place.partition("::")
        links.append(f"[{function.rpartition('::')[2].removeprefix('test_')}](../{path})")
    return ", ".join(links)


def _gpu() -> str:
    lines = [_line(["row", "command"]), _line(["---", "---"])]
    lines += [_line([row, f"`{CHECK}{checks}`"]) for row, checks in sorted(WAITS_FOR_A_GPU.items())]
    return (
        "## Waits for a GPU\n\nUnverified until this has run on one ([gpu.md](gpu.md)):\n\n"
        + "\n".join(lines)
    )


def _untried() -> str:
    lines = [_line(["architecture", "why"]), _line(["---", "---"])]
    lines += [_line(each) for each in sorted(UNTRIED.items())]
    return (
        "## Not tried\n\nvLLM's registry has these too, whose code can build experts. There is no small "
        "checkpoint of them to test with:\n\n" + "\n".join(lines)
    )


PARTS = {
    "contracts with vLLM and vllm-router": "tests/compat/",
    "formats": "tests/formats/",
    "engines and servers": "tests/e2e/",
    "everything else": "tests/",
}
"""Of the tests, by folder; each test is in the first that it fits."""


def count(ended: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """How many tests of each part ended how, from how each ended."""
    counts: dict[str, dict[str, int]] = {}
    for test, outcome in sorted(ended.items()):
        part = next(name for name, folder in PARTS.items() if test.startswith(folder))
        of_part = counts.setdefault(part, {})
        of_part[outcome] = of_part.get(outcome, 0) + 1
    return counts


def render_versions(results: Results) -> str:
    """Return the text of docs/versions.md."""
    parts = ["# Versions of vLLM", MADE]
    parts.append(
        "`make test-all` runs the whole suite with the first version, and what is meant for every "
        "version (the contracts, every format and model, settings and requests, servers, LoRA, "
        "speculation, new weights, pooling) with the others; `.ci/run` does so without slow "
        "tests. Other tests were run with a version by hand, where a row says how they ended. "
        "There is no CPU build of 0.33.0: its Python runs over the compiled parts of 0.32.0's "
        "(`tests/helpers/other_vllm.py`), and calls the one kernel whose signature changed as it "
        "was compiled."
    )
    columns = ["vLLM", "torch", "transformers", "Python", "last run", "machine", *PARTS]
    lines = [_line(columns), _line("---" for _ in columns)]
    for version, result in results.items():
        facts = [result.get(key, "?") for key in ("torch", "transformers", "python")]
        facts += [result.get("date", "?"), result.get("machine", "?")]
        counts = [_counted(result.get("counts", {}).get(part, {})) for part in PARTS]
        lines.append(_line([version, *facts, *counts]))
    return "\n\n".join([*parts, "\n".join(lines)]) + "\n"


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items())) or "-"
