"""A stream that plays the part of compute, and its graphs, on whichever driver the process finds.

Its kernels are copies, so that the order of copies and kernels can be checked without torch: on a GPU,
or over the fake driver (`gpu_checks.fake`). What the product never asks of a stream, but a question here
does, is asked here: batch copies with and without the overlap flag, waits for values and writes of them.
"""

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, Self

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


def _find(name: str) -> Any:
    """Return a function of the driver.

    Raises:
        TransferError: this driver has none of that name.
    """
    found = _batch_copy() if name == "cuMemcpyBatchAsync" else getattr(_driver(), name, None)
    if found is None:
        raise TransferError(f"this driver has no {name}")
    return found


def _call(name: str, *arguments: object) -> None:
    result = _find(name)(*arguments)
    if result:
        text = ctypes.c_char_p()
        _driver().cuGetErrorName(result, ctypes.byref(text))
        raise TransferError(f"{name} returned {result} ({(text.value or b'unknown').decode()})")


class _CopyAttributes(ctypes.Structure):
    """The driver's CUmemcpyAttributes; hints of locations are left empty."""

    _fields_ = (
        ("source_order", ctypes.c_int),
        ("hints", ctypes.c_int * 4),
        ("flags", ctypes.c_uint),
    )


@functools.cache
def _batch_copy() -> object:
    """Return the batch copy of CUDA 12.8, which the library does not name; None if it is missing."""
    address = ctypes.c_void_p()
    _driver().cuGetProcAddress(
        b"cuMemcpyBatchAsync", ctypes.byref(address), 12080, ctypes.c_uint64(0)
    )
    return ctypes.CFUNCTYPE(ctypes.c_int)(address.value) if address.value else None


class BatchCopies:
    """`(destination, source, num_bytes)` copies, as the batch call takes them.

    Args:
        overlap: ask for copies beside kernels, that is for copy engines.
    """

    def __init__(self, copies: Sequence[tuple[int, int, int]], *, overlap: bool) -> None:
        count = len(copies)
        columns = [(ctypes.c_size_t * count)(*column) for column in zip(*copies, strict=True)]
        attributes = _CopyAttributes(source_order=1, flags=int(overlap))
        first, failed = ctypes.c_size_t(0), ctypes.c_size_t()
        self.arguments = (
            *columns,
            ctypes.c_size_t(count),
            ctypes.byref(attributes),
            ctypes.byref(first),
            ctypes.c_size_t(1),
            ctypes.byref(failed),
        )


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
    """A stream whose kernels are copies: non-blocking and its own, or one that there is already.

    Args:
        handle: a CUstream that stays the caller's; 0 is the legacy default stream.
    """

    def __init__(self, ordinal: int = 0, *, handle: int | None = None) -> None:
        self._context = _Context(ordinal)
        self._stream = ctypes.c_void_p(handle)
        self._is_own = handle is None
        if self._is_own:
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

    def copy_batch(self, copies: "BatchCopies") -> None:
        """Enqueue copies by one batch call, in no order."""
        self._context.call("cuMemcpyBatchAsync", *copies.arguments, self._stream)

    def wait_value(self, address: int, value: int) -> None:
        """Enqueue (or capture) a wait until the 32-bit word at `address` is at least `value`."""
        self._value("cuStreamWaitValue32_v2", address, value)

    def write_value(self, address: int, value: int) -> None:
        """Enqueue (or capture) a write of a 32-bit word, seen after everything before it."""
        self._value("cuStreamWriteValue32_v2", address, value)

    def _value(self, name: str, address: int, value: int) -> None:
        self._context.call(
            name, self._stream, ctypes.c_uint64(address), ctypes.c_uint32(value), ctypes.c_uint(0)
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
        if self._is_own:
            self._context.call("cuStreamDestroy_v2", self._stream)
        self._context.close()
