"""Who in a source tree reads where a rank stands, and the list of those that were looked at."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

PLACE = {
    "data_parallel_index",
    "data_parallel_rank",
    "data_parallel_rank_local",
    "data_parallel_size",
    "data_parallel_size_local",
    "data_parallel_external_lb",
    "data_parallel_hybrid_lb",
    "local_engines_only",
}


class Readers(ast.NodeVisitor):
    """Collects the names of `PLACE` by the function or class that has them, also those in quotes."""

    def __init__(self) -> None:
        self.found: defaultdict[str, set[str]] = defaultdict(set)
        self._scope: list[str] = []

    def _enter(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        self._scope.append(node.name)
        self.generic_visit(node)
        self._scope.pop()

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = _enter

    def _note(self, name: object) -> None:
        if name in PLACE:
            self.found[".".join(self._scope) or "-"].add(str(name))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._note(node.attr)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        self._note(node.value)


def readers(text: str) -> dict[str, set[str]]:
    """Return the names that each function or class of a source touches."""
    visitor = Readers()
    visitor.visit(ast.parse(text))
    return dict(visitor.found)


def readers_of(root: Path) -> Iterator[str]:
    """One line for each reader below a folder: module, function, names without `data_parallel_`."""
    for path in sorted(root.rglob("*.py")):
        text = path.read_text()
        if any(name in text for name in PLACE):
            for function, names in sorted(readers(text).items()):
                short = sorted(name.removeprefix("data_parallel_") for name in names)
                yield f"{path.relative_to(root).as_posix()} {function}: {' '.join(short)}"


def looked_at(file: Path) -> dict[str, str]:
    """Return the readers that were looked at, each with the row of docs/compat.md that it belongs to."""
    rows: dict[str, str] = {}
    row = ""
    for line in file.read_text().splitlines():
        if line.startswith("["):
            row = line.strip("[]")
        elif line and not line.startswith("#"):
            rows[line] = row
    return rows
