"""The half of a Triton back end that compiles: never, see the package."""

from typing import Any

from triton.backends.compiler import BaseBackend


class Compiler(BaseBackend):
    """What Triton asks of a back end."""

    @staticmethod
    def supports_target(target: Any) -> bool:
        return bool(target.backend == "cpu")

    def hash(self) -> str:
        return "interpreter"

    def parse_options(self, options: dict[str, Any]) -> object:
        raise NotImplementedError

    def add_stages(self, *given: Any, **named: Any) -> None:
        raise NotImplementedError

    def load_dialects(self, context: Any) -> None:
        raise NotImplementedError

    def get_module_map(self) -> dict[str, Any]:
        raise NotImplementedError
