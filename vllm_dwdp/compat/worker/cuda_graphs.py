"""CUDA graphs as torch makes them: followers are told of every capture and every launch.

vLLM captures and replays in many places (piecewise and full, both model runners, drafters), all of
them through `torch.cuda.CUDAGraph`; so that class is the seam, and no runner needs to be known.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch


class Follower(Protocol):
    """What is told of graphs; whatever it says of a capture comes back at every launch."""

    def begin_capture(self) -> None:
        """Note that the capture of a graph begins."""

    def end_capture(self) -> Any:
        """Note that the capture ended; return what a launch will do, false if that is nothing."""

    def before_launch(self, effect: Any) -> None:
        """Prepare for a launch of the graph."""

    def after_launch(self, effect: Any) -> None:
        """Note that the graph was launched."""


@contextmanager
def followed_by(
    followers: Sequence[Follower], graph_class: type = torch.cuda.CUDAGraph
) -> Iterator[None]:
    """While active, every graph of this process tells `followers` of its capture and its launches.

    Args:
        followers: told in order.
        graph_class: whose `capture_begin`, `capture_end` and `replay` are wrapped.
    """
    captured: WeakKeyDictionary[Any, list[Any]] = WeakKeyDictionary()

    def capture_begin(stock: Callable[..., Any], graph: Any, *args: Any, **kwargs: Any) -> Any:
        captured.pop(graph, None)
        for follower in followers:
            follower.begin_capture()
        return stock(graph, *args, **kwargs)

    def capture_end(stock: Callable[..., Any], graph: Any, *args: Any, **kwargs: Any) -> Any:
        effects = [follower.end_capture() for follower in followers]
        result = stock(graph, *args, **kwargs)
        if any(effects):
            captured[graph] = effects
        return result

    def replay(stock: Callable[..., Any], graph: Any, *args: Any, **kwargs: Any) -> Any:
        effects = captured.get(graph, ())
        for follower, effect in zip(followers, effects, strict=False):
            follower.before_launch(effect)
        result = stock(graph, *args, **kwargs)
        for follower, effect in zip(followers, effects, strict=False):
            follower.after_launch(effect)
        return result

    wrapped = (capture_begin, capture_end, replay)
    before = {name.__name__: getattr(graph_class, name.__name__) for name in wrapped}
    for wrapper in wrapped:
        stock = before[wrapper.__name__]
        replacement = functools.wraps(stock)(_bound(wrapper, stock))
        setattr(graph_class, wrapper.__name__, replacement)
    try:
        yield
    finally:
        for name, stock in before.items():
            setattr(graph_class, name, stock)


def _bound(wrapper: Callable[..., Any], stock: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that calls `wrapper(stock, self, ...)`."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(stock, self, *args, **kwargs)

    return method
