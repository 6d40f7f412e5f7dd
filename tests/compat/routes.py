"""Every route of vLLM's HTTP server, read off its sources."""

import ast
from collections.abc import Iterator
from pathlib import Path

METHODS = {"get", "post", "put", "patch", "delete", "head", "api_route", "add_api_route"}


def routes_of(folder: Path) -> set[str]:
    """Return the paths that modules below a folder give to routers."""
    return {
        route
        for path in sorted(folder.rglob("*.py"))
        if "route" in (text := path.read_text()) or "@app." in text
        for route in routes(text)
    }


def routes(text: str) -> Iterator[str]:
    """Yield the paths that a module gives to routers and apps."""
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in METHODS
            and ast.unparse(node.func.value).endswith(("router", "app"))
            and node.args
            and isinstance(node.args[0], ast.Constant)
            and str(node.args[0].value).startswith("/")
        ):
            yield str(node.args[0].value)
