"""An offline `LLM` whose calls may be cut short: what they had asked for is aborted then.

Stock vLLM leaves the requests behind, and the next call returns their outputs in the place of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import vllm
from vllm.v1.engine.exceptions import EngineDeadError


class InterruptibleLLM(vllm.LLM):
    """`vllm.LLM`; after Ctrl-C in a call the next one begins afresh."""

    def _render_and_add_requests(self, *args: Any, **kwargs: Any) -> list[str]:
        with aborted_if_cut_short(self.llm_engine, keep_earlier=True):
            added: list[str] = super()._render_and_add_requests(*args, **kwargs)
            return added

    def _run_engine(self, *args: Any, **kwargs: Any) -> list[Any]:
        with aborted_if_cut_short(self.llm_engine, keep_earlier=False):
            outputs: list[Any] = super()._run_engine(*args, **kwargs)
            return outputs


@contextmanager
def aborted_if_cut_short(engine: Any, *, keep_earlier: bool) -> Iterator[None]:
    """Abort the requests of a call that raises.

    Args:
        engine: vLLM's `LLMEngine`.
        keep_earlier: whether requests that were there before belong to another call.
    """
    processor = engine.output_processor
    earlier: set[str] = set()
    if keep_earlier:
        earlier |= processor.request_states.keys() | processor.parent_requests.keys()
    try:
        yield
    except BaseException:
        left = [*processor.request_states, *processor.parent_requests]
        with suppress(EngineDeadError):
            engine.abort_request([name for name in left if name not in earlier], internal=True)
        raise
