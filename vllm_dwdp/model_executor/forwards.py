"""Couples views to the forwards of a model: chooses each one's view, and counts what ran.

A forward begins and ends at hooks on the outermost module, outside of what is compiled. A captured graph
keeps the view that it was captured with. Where it holds a whole forward, its launches run no hook, and
are counted here as they happen. Worker's main thread.
"""

from contextlib import ExitStack
from typing import Any

import torch

from vllm_dwdp.compat.worker import cuda_graphs
from vllm_dwdp.compat.worker.forward import num_tokens_of_forward
from vllm_dwdp.model_executor.views import ExpertViews
from vllm_dwdp.prefetch.mode_policy import Mode


class Forwards:
    """The forwards of one model since it was loaded, warm-up included.

    Args:
        views: whose view is put in place for each of them.
    """

    def __init__(self, views: ExpertViews) -> None:
        self.begun = self.ended = 0
        self.by_mode = dict.fromkeys(views.policy.modes, 0)
        self._views = views
        self._is_capturing = False
        self._captured: Mode | None = None

    def begin(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note that a forward starts: a real, dummy, profiling, warm-up or captured one."""
        self.begun += 1
        num_tokens = num_tokens_of_forward()
        if num_tokens is None:
            num_tokens = _length_of_inputs(args, kwargs)
        mode = self._views.begin_forward(num_tokens)
        if self._is_capturing:
            self._captured = mode
        else:
            self.by_mode[mode] += 1

    def end(self, *_: object) -> None:
        """Note that the forward ended or failed; the next wait repairs a ring that was cut short."""
        self.ended += 1

    def begin_capture(self) -> None:
        """Note that a capture begins; a forward that starts inside it does not run now."""
        self._is_capturing, self._captured = True, None

    def end_capture(self) -> Mode | None:
        """Note that the capture ended; return the mode of the forward in it, None for a piece of one."""
        mode, self._captured, self._is_capturing = self._captured, None, False
        return mode

    def before_launch(self, mode: Mode | None) -> None:
        """Note that a graph is launched: a whole forward runs, unless hooks have counted it already."""
        if mode is not None:
            self.by_mode[mode] += 1

    def after_launch(self, mode: Mode | None) -> None:
        """Nothing is left to do."""


def couple(
    model: torch.nn.Module, views: ExpertViews, *, captures_graphs: bool, undo: ExitStack
) -> Forwards:
    """Put the right view in place for every forward of `model`, until `undo` ends that.

    Args:
        captures_graphs: whether forwards may run inside captured CUDA graphs.
    """
    forwards = Forwards(views)
    for handle in (
        model.register_forward_pre_hook(forwards.begin, with_kwargs=True),
        model.register_forward_hook(forwards.end, always_call=True),
    ):
        undo.callback(handle.remove)
    if captures_graphs:
        undo.enter_context(cuda_graphs.followed_by([forwards]))
    return forwards


def _length_of_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Tokens of a forward of which vLLM does not say: the length of its first tensor."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.dim() >= 1:
            return int(value.shape[0] if value.is_floating_point() else value.shape[-1])
    return 0
