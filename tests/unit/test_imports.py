"""Imports point one way, and `import vllm_dwdp` needs nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import vllm_dwdp

PACKAGE = Path(vllm_dwdp.__file__).parent

PURE = {
    "errors",
    "logger",
    "config",
    "placement",
    "memory.container",
    "memory.digest",
    "memory.layout",
    "memory.slots",
    "transfer.copy_plan",
    "transfer.schedule",
    "transfer.mode_policy",
    "planner.checked",
    "planner.config_fields",
    "planner.layer_kinds",
    "planner.module_names",
    "planner.percentiles",
    "planner.capacity",
    "planner.hardware",
    "planner.quantisation",
    "planner.model_shape",
    "planner.cost",
    "planner.contention",
    "planner.estimates",
    "planner.advice",
    "planner.plan",
    "planner.traffic",
    "planner.simulate",
    "planner.disaggregated",
    "planner.paper.factors",
    "planner.paper.saturated",
    "planner.paper.kernels",
    "planner.paper.deployments",
    "planner.paper.rows",
}
LEVELS = (
    ("errors", "logger", "placement"),
    (
        "config",
        "memory.layout",
        "memory.slots",
        "transfer.copy_plan",
        "transfer.schedule",
        "transfer.mode_policy",
    ),
    ("memory", "transfer", "distributed", "native", "cuda_driver", "planner"),
    ("compat.moe", "compat.cpu", "compat.gpu", "compat.independent", "compat.cuda_graphs"),
    ("model_executor",),
    ("executor", "metrics"),
    ("compat",),
    ("entrypoints", "testing"),
)
"""A module may import from its own level and from those above it in this list."""


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imported(path: Path) -> set[str]:
    """Dotted names that a module imports anywhere, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def is_package(path: Path) -> bool:
    return path.name == "__init__.py"


def level(module: str) -> int:
    exact = [n for n, names in enumerate(LEVELS) if module in names]
    if exact:
        return exact[0]
    package = module.split(".", maxsplit=1)[0]
    return next(n for n, names in enumerate(LEVELS) if package in names)


def test_every_module_has_a_level() -> None:
    for module in modules():
        if module:
            level(module)


def test_imports_point_one_way() -> None:
    known = modules()
    for module, path in known.items():
        if not module:
            continue
        for name in imported(path):
            target = name.removeprefix("vllm_dwdp.")
            if name.startswith("vllm_dwdp.") and target in known and not is_package(known[target]):
                assert level(target) <= level(module), f"{module} imports {target}"


def test_the_pure_core_is_pure() -> None:
    known = modules()
    for module in PURE & set(known):
        for name in imported(known[module]):
            assert name.split(".")[0] not in ("torch", "vllm", "ctypes"), f"{module}: {name}"


def test_private_vllm_names_live_in_compat() -> None:
    """Outside `compat`, nothing reaches into an attribute of vLLM that begins with an underscore."""
    for module, path in modules().items():
        if module.startswith("compat"):
            continue
        for name in imported(path):
            if name.startswith("vllm."):
                private = [part for part in name.split(".") if part.startswith("_")]
                assert not private, f"{module} imports {name}"


def test_importing_the_package_imports_neither_vllm_nor_torch() -> None:
    script = (
        "import sys, vllm_dwdp; "
        "print([name for name in ('vllm', 'torch', 'vllm_dwdp.native') if name in sys.modules])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert ended.stdout.strip() == "[]"
