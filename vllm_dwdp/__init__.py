"""vllm-dwdp: Mixture-of-Experts models on independent vLLM ranks that share one copy of the experts.

`import vllm_dwdp` needs no GPU, no driver, no built extension and does not import vLLM.
"""

from typing import Any

__version__ = "0.2.0"
__all__ = ["LLM", "__version__", "register"]


def register() -> None:
    """vLLM's plugin entry point: teach `EngineArgs` and `serve` the backend name `dwdp`. Idempotent."""
    from vllm_dwdp.compat.frontend import engine_args, serve_defaults

    engine_args.install()
    serve_defaults.install()


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from vllm_dwdp.entrypoints.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
