"""Imports point one way, and `import vllm_dwdp` needs nothing."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import vllm_dwdp

PACKAGE = Path(vllm_dwdp.__file__).parent

LEVELS = (
    ("errors", "logger"),
    ("config", "layout"),
    ("device", "distributed"),
    ("prefetch",),
    ("planner",),
    ("compat/worker",),
    ("model_executor",),
    ("executor",),
    ("compat/frontend",),
    ("paper",),
    ("entrypoints",),
    ("entrypoints/doctor", "entrypoints/pictures"),
    ("entrypoints/launch",),
    ("entrypoints/bench",),
    ("entrypoints/cli",),
)
"""Rooms (folders, and modules of the top level): each may import from those above it in this list."""

PURE = ("errors", "logger", "config", "layout", "prefetch", "planner", "paper")
"""Rooms that reach neither torch nor vLLM, whatever they import."""

PRIVATE_ELSEWHERE = {
    "torch._C._construct_storage_from_data_pointer": "no public way to make a storage at an address",
    "torch.autograd._profiler_enabled": "no public way to ask whether a profiler runs",
    "getattr(model.hf_config, '_commit_hash')": "transformers has no public name for the commit",
    "os._exit": "its public name",
}
"""Private names of others that may be used outside of `compat`, and why."""

Graph = Mapping[str, set[str]]


def find_modules() -> dict[str, Path]:
    """Every module of the package but the faces of packages, which import nothing early."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "__init__.py"
    }


def imported(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (module, name) of everything that a module imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name) for alias in node.names)


def import_graph() -> Graph:
    """Our modules, and which of ours each imports; a name of a package's face leads to its module."""
    known = find_modules()
    graph: dict[str, set[str]] = {}
    for module, path in known.items():
        graph[module] = set()
        for name, imported_name in imported(path):
            if name.split(".")[0] == "vllm_dwdp":
                inner = name.removeprefix("vllm_dwdp").removeprefix(".")
                whole = f"{inner}.{imported_name}".removeprefix(".")
                graph[module] |= {whole, inner} & known.keys()
    return graph


def room_of(module: str) -> str:
    """Return the folder of a module; a module of the top level is a room of its own."""
    return "/".join(module.split(".")[:-1]) or module


def rooms_of(graph: Graph) -> Graph:
    rooms: dict[str, set[str]] = {}
    for module, targets in graph.items():
        own = rooms.setdefault(room_of(module), set())
        own |= {room_of(target) for target in targets} - {room_of(module)}
    return rooms


def find_cycles(graph: Graph) -> list[set[str]]:
    """Strongly connected components of more than one node: every node reaches every other."""
    reachable = {node: reach(graph, node) for node in graph}
    cycles = [
        {other for other in reachable[node] if node in reachable[other]} | {node} for node in graph
    ]
    return [
        cycle
        for number, cycle in enumerate(cycles)
        if len(cycle) > 1 and cycle not in cycles[:number]
    ]


def reach(graph: Graph, start: str) -> set[str]:
    """Everything that `start` imports, directly or not."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        for target in graph.get(waiting.pop(), ()):
            if target not in found:
                found.add(target)
                waiting.append(target)
    return found


def test_every_room_has_one_level() -> None:
    levels = [room for level in LEVELS for room in level]
    assert len(set(levels)) == len(levels)
    assert set(rooms_of(import_graph())) == set(levels)


def test_imports_point_one_way() -> None:
    level = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}
    for room, targets in rooms_of(import_graph()).items():
        wrong = [target for target in targets if level[target] >= level[room]]
        assert not wrong, f"{room} imports {wrong}"


def test_no_module_imports_itself_through_others() -> None:
    assert find_cycles(import_graph()) == []


@pytest.mark.parametrize("room", PURE)
def test_pure_rooms_reach_neither_torch_nor_vllm(room: str) -> None:
    graph, paths = import_graph(), find_modules()
    inside = [module for module in graph if room_of(module) == room]
    assert inside
    for module in {*inside, *(other for each in inside for other in reach(graph, each))}:
        outside = {name.split(".")[0] for name, _ in imported(paths[module])}
        assert not outside & {"torch", "vllm"}, f"{room} reaches {module}"


def test_importing_the_package_imports_neither_vllm_nor_torch() -> None:
    script = (
        "import sys, vllm_dwdp; "
        "print([name for name in ('vllm', 'torch', 'ctypes') if name in sys.modules])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert ended.stdout.strip() == "[]"


# --- private names of others ----------------------------------------------------------------------


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name not in NAMED_TUPLES


NAMED_TUPLES = ("_replace", "_asdict", "_fields", "_make")
"""What is public of named tuples."""


def private_names_made(tree: ast.AST) -> set[str]:
    """Return the private names that a module gives to its functions, classes and attributes."""
    made = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            made.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            made.add(node.attr if ast.unparse(node.value) == "self" else "")
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            made.add(node.id)
    return {name for name in made if is_private(name)}


def private_names_used(tree: ast.AST, own: set[str]) -> Iterator[str]:
    """List the underscored names that a module reaches for and that are not its objects' `own`.

    Attributes of anything but `self` and `cls`; those of `self` and `cls` that a base class from
    elsewhere must have made; attributes by name; names and modules of vLLM and torch.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            base = ast.unparse(node.value)
            if base not in ("self", "cls") or node.attr not in own:
                yield f"{base}.{node.attr}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ATTRIBUTE_FUNCTIONS:
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            if isinstance(name, str) and is_private(name):
                yield f"{ast.unparse(node.func)}({ast.unparse(node.args[0])}, {name!r})"
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            if names[0] in ("vllm", "torch") and any(is_private(name) for name in names):
                yield ast.unparse(node)


ATTRIBUTE_FUNCTIONS = ("getattr", "setattr", "hasattr", "delattr", "operator.attrgetter")


def private_names_by_module() -> dict[str, list[str]]:
    """By module outside of `compat`: what it reaches for that others call private."""
    graph, paths = import_graph(), find_modules()
    trees = {module: ast.parse(path.read_text()) for module, path in paths.items()}
    made = {module: private_names_made(tree) for module, tree in trees.items()}
    found = {}
    for module, tree in trees.items():
        if not module.startswith("compat."):
            own = made[module].union(*(made[target] for target in graph[module]))
            found[module] = [
                name
                for name in private_names_used(tree, own)
                if not any(allowed.startswith(name) for allowed in PRIVATE_ELSEWHERE)
            ]
    return found


def test_nothing_outside_compat_reaches_for_what_others_call_private() -> None:
    found = {module: names for module, names in private_names_by_module().items() if names}
    assert not found


@pytest.mark.parametrize(
    "code",
    [
        "config._api_process_rank",
        "self.worker._model",
        "super()._init_executor()",
        "class Ours(Theirs):\n    def f(self): return self._theirs",
        "getattr(config, '_name', None)",
        "from vllm._custom_ops import op",
        "from torch import _dynamo",
        "config._name = 1",
    ],
)
def test_reaching_for_a_private_name_is_seen(code: str) -> None:
    tree = ast.parse(code)
    assert list(private_names_used(tree, private_names_made(tree)))


def test_our_own_private_names_are_ours() -> None:
    code = (
        "class Ours:\n    def __init__(self): self._own = self._f()\n    def _f(self): return _g()"
    )
    tree = ast.parse(code)
    assert not list(private_names_used(tree, private_names_made(tree)))
