"""What source code does, read from its syntax tree: a comment or a string cannot satisfy a contract."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any


def tree(thing: Any) -> ast.AST:
    """Return the syntax tree of a module, class or function."""
    return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(thing))))


def calls(thing: Any) -> list[str]:
    """Return the dotted names of what it calls, in the order of its source."""
    found = [node for node in ast.walk(tree(thing)) if isinstance(node, ast.Call)]
    return [ast.unparse(node.func) for node in sorted(found, key=_place)]


def assignments(thing: Any) -> Iterator[tuple[str, str]]:
    """Each target that it assigns to, with the value."""
    for node in ast.walk(tree(thing)):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                yield ast.unparse(target), ast.unparse(node.value)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            yield ast.unparse(node.target), ast.unparse(node.value)


def entries(thing: Any) -> Iterator[tuple[str, str]]:
    """Each constant key of the dictionaries that it writes down, with the value."""
    for node in ast.walk(tree(thing)):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant):
                    yield str(key.value), ast.unparse(value)


def _place(node: ast.expr) -> tuple[int, int]:
    return node.lineno, node.col_offset
