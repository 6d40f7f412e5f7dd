"""A stream that plays the part of compute, and its graphs, on whichever driver the process finds.

Its kernels are copies, so that the order of copies and kernels can be checked without torch: on a GPU,
or over the fake driver (`gpu_checks.fake`).
"""

import ctypes
import functools
from typing import Self

from vllm_dwdp.errors import TransferError


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


class _Context:
    """A device's primary context, current during each call."""

    def __init__(self, ordinal: int) -> None:
        self._ordinal = ordinal
        self._context = ctypes.c_void_p()
        _call("cuInit", 0)
        _call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), ordinal)

    def call(self, name: str, *arguments: object) -> None:
        _call("cuCtxPushCurrent_v2", self._context)
        try:
            _call(name, *arguments)
        finally:
            _call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def close(self) -> None:
        _call("cuDevicePrimaryCtxRelease_v2", self._ordinal)


def _call(name: str, *arguments: object) -> None:
    result = getattr(_driver(), name)(*arguments)
    if result:
        text = ctypes.c_char_p()
        _driver().cuGetErrorName(result, ctypes.byref(text))
        raise TransferError(f"{name} returned {result} ({(text.value or b'unknown').decode()})")


class Graph:
    """A captured and instantiated graph."""

    def __init__(self, context: _Context, executable: ctypes.c_void_p) -> None:
        self._context = context
        self._executable = executable

    def launch(self, stream: "ComputeStream") -> None:
        """Enqueue the graph."""
        self._context.call("cuGraphLaunch", self._executable, ctypes.c_void_p(stream.handle))

    def close(self) -> None:
        """Destroy the graph, once its last launch is over."""
        self._context.call("cuGraphExecDestroy", self._executable)


class ComputeStream:
    """A stream whose kernels are copies: non-blocking and its own, or the legacy default stream."""

    def __init__(self, ordinal: int = 0, *, default: bool = False) -> None:
        self._context = _Context(ordinal)
        self._stream = ctypes.c_void_p()
        if not default:
            self._context.call("cuStreamCreate", ctypes.byref(self._stream), 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def handle(self) -> int:
        """The CUstream."""
        return self._stream.value or 0

    def copy(self, destination: int, source: int, num_bytes: int) -> None:
        """Enqueue (or capture) a copy between device addresses."""
        self._context.call(
            "cuMemcpyAsync",
            ctypes.c_uint64(destination),
            ctypes.c_uint64(source),
            ctypes.c_size_t(num_bytes),
            self._stream,
        )

    def begin_capture(self, mode: int = 0) -> None:
        """Begin to capture; 0 is the global mode, 1 thread-local, 2 relaxed."""
        self._context.call("cuStreamBeginCapture_v2", self._stream, mode)

    def end_capture(self) -> Graph:
        """Return the instantiated graph of what was captured."""
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._context.call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
        self._context.call(
            "cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_uint64(0)
        )
        self._context.call("cuGraphDestroy", graph)
        return Graph(self._context, executable)

    def synchronize(self) -> None:
        """Block until the stream is idle."""
        self._context.call("cuStreamSynchronize", self._stream)

    def close(self) -> None:
        """Finish and destroy the stream."""
        self.synchronize()
        if self._stream:
            self._context.call("cuStreamDestroy_v2", self._stream)
        self._context.close()
