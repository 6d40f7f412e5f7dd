"""`make tables`: takes the last results into docs/results.json and writes the tables in docs.

python -m tests.tables [--no-results]
"""

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.tables.collect import Collected, collect
from tests.tables.record import FOLDER, ROOT, recorded
from tests.tables.render import FILES, count, render, render_versions

DOCS = ROOT / "docs"
RESULTS = DOCS / "results.json"
FACTS = ("machine", "python", "torch", "transformers")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        collected = collect(Path(folder))
    results = committed()
    if "--no-results" not in sys.argv:
        results = taken(collected, results)
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    for name, text in tables(collected, results).items():
        (DOCS / name).write_text(text)


def committed() -> dict[str, dict[str, Any]]:
    """Return the results that are in the repository, by version, the oldest first."""
    if not RESULTS.exists():
        return {}
    found: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text())
    return dict(sorted(found.items()))


def taken(collected: Collected, before: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what was recorded here, over what was committed, of the tests that there are."""
    results = {}
    carrying = {row.test for row in collected.rows}
    here = {path.stem for path in FOLDER.glob("*.json")} - {"none"}
    for number, version in enumerate(sorted(here | set(before))):
        noted = recorded(version)
        old = before.get(version, {"tests": {}})
        ran = {test: noted["tests"][test] for test in collected.tests & set(noted["tests"])}
        kept = {test: end for test, end in old["tests"].items() if test in carrying}
        tests = kept | {test: end for test, end in ran.items() if test in carrying}
        results[version] = {fact: noted.get(fact, old.get(fact)) for fact in FACTS} | {
            "date": max([end["date"] for end in ran.values()], default=old.get("date")),
            "counts": count({test: end["outcome"] for test, end in ran.items()})
            or old.get("counts", {}),
            "tests": {
                test: {key: value for key, value in end.items() if key != "date"}
                for test, end in sorted(tests.items())
            },
            "is_main": number == 0,
        }
    return results


def tables(collected: Collected, results: Mapping[str, Any]) -> dict[str, str]:
    """Return the text of each file in docs, by name."""
    made = {name: render(table, collected.rows, results) for table, name in FILES.items()}
    return made | {"versions.md": render_versions(results)}


if __name__ == "__main__":
    main()
