"""Which architectures of vLLM's registry have routed experts, found in the source of their classes.

No model is imported: most need packages, kernels or devices that a machine lacks.
"""

import ast
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path

MODELS = "vllm.model_executor.models"
MAKER = "FusedMoEFactory"
"""What builds a fused-MoE layer."""
GENERATION = (
    "_TEXT_GENERATION_MODELS",
    "_EMBEDDING_MODELS",
    "_LATE_INTERACTION_MODELS",
    "_REWARD_MODELS",
    "_TOKEN_CLASSIFICATION_MODELS",
    "_SEQUENCE_CLASSIFICATION_MODELS",
    "_MULTIMODAL_MODELS",
    "_TRANSFORMERS_SUPPORTED_MODELS",
    "_TRANSFORMERS_BACKEND_MODELS",
)
"""The registry's tables of models that are served; drafters run beside one of these."""

Imports = dict[str, list[tuple[str, str]]]
Definitions = dict[str, list[ast.AST]]


def architectures_with_experts() -> dict[str, tuple[str, str]]:
    """Every architecture that is served and builds experts: the module and name of its class."""
    from vllm.model_executor.models import registry

    found = {}
    for table in GENERATION:
        for architecture, (module, name) in getattr(registry, table).items():
            full = module if module.startswith("vllm.") else f"{MODELS}.{module}"
            if _builds_experts(full, name):
                found[architecture] = (full, name)
    return found


@functools.cache
def _builds_experts(module: str, name: str) -> bool:
    """Whether the classes that `name` uses, or those that they use, build experts."""
    seen: set[tuple[str, str]] = set()
    waiting = [(module, name)]
    while waiting:
        place = waiting.pop()
        if place in seen:
            continue
        seen.add(place)
        used = set(_used_by(*place))
        if any(each == MAKER for _, each in used):
            return True
        waiting += [each for each in used if each[0].startswith((MODELS, "vllm.models"))]
    return False


def _used_by(module: str, name: str) -> Iterator[tuple[str, str]]:
    """Yield the names that a definition uses, where they are defined."""
    imports, definitions = _names_of(module)
    if name not in definitions:
        yield from imports.get(name, ())
        return
    for node in definitions[name]:
        for each in ast.walk(node):
            if isinstance(each, ast.Name) and each.id in definitions:
                yield module, each.id
            elif isinstance(each, ast.Name):
                yield from imports.get(each.id, ())


@functools.cache
def _names_of(module: str) -> tuple[Imports, Definitions]:
    path = _source(module)
    imports: Imports = {}
    definitions: Definitions = {}
    if path is None:
        return imports, definitions
    tree = ast.parse(path.read_text())
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            source = importlib.util.resolve_name(relative, package)
            for alias in node.names:
                imports.setdefault(alias.asname or alias.name, []).append((source, alias.name))
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            definitions.setdefault(node.name, []).append(node)
    for statement in tree.body:
        if isinstance(statement, ast.Assign):
            for target in statement.targets:
                if isinstance(target, ast.Name):
                    definitions.setdefault(target.id, []).append(statement)
    return imports, definitions


@functools.cache
def _source(module: str) -> Path | None:
    found = importlib.util.find_spec("vllm")
    assert found is not None and found.origin is not None
    path = Path(found.origin).parent.joinpath(*module.split(".")[1:])
    file, package = path.with_suffix(".py"), path / "__init__.py"
    return file if file.is_file() else package if package.is_file() else None
