"""What `test_cuda_driver.py` runs in child processes, where `libcuda.so.1` is the fake driver.

Each function is one process: `python -m tests.unit.device.cuda_scenarios NAME`. With the fake nothing of
this says anything about hardware; it shows that the wrapper keeps the driver's documented rules.
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

import pytest

from gpu_checks.fake_cuda import ComputeStream, Graph, live_objects
from vllm_dwdp.device.cuda_driver import CudaCopyQueue, CudaDevice, ReadOnlyAccessError
from vllm_dwdp.errors import DwdpMemoryError, TransferError

PAGE = 2 << 20
SLOT_BYTES = 4096
NUM_LAYERS = 6
POISON = b"\xff" * SLOT_BYTES


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextlib.contextmanager
def memory(
    device: CudaDevice, *sizes: int, handle_type: str = "posix_fd"
) -> Iterator[tuple[int, list[int]]]:
    """One writable range over several allocations: its address and their handles."""
    with contextlib.ExitStack() as stack:
        total = sum(sizes)
        address = device.reserve(total)
        stack.callback(device.free_address, address, total)
        handles = []
        for index, size in enumerate(sizes):
            handle = device.create(size, handle_type=handle_type)  # type: ignore[arg-type]
            stack.callback(device.release, handle)
            handles.append(handle)
            start = address + sum(sizes[:index])
            device.map(start, size, handle)
            stack.callback(device.unmap, start, size)
        device.set_access(address, total, writable=True)
        yield address, handles


# --- memory --------------------------------------------------------------------------------------


def memory_rules() -> None:
    """Every rule of the driver is an error that names the call, its arguments and the result."""
    with CudaDevice(0) as device:
        assert "FAKE" in device.name
        assert device.granularity_bytes == PAGE
        free_bytes = device.free_bytes
        address = device.reserve(4 * PAGE)
        handle = device.create(2 * PAGE, handle_type="none")
        assert device.free_bytes == free_bytes - 2 * PAGE < device.total_bytes

        invalid = r"\) returned 1 \(CUDA_ERROR_INVALID_VALUE\)$"
        for call, message in (
            (lambda: device.create(PAGE + 1, handle_type="none"), rf"cuMemCreate\(_, {PAGE + 1}, "),
            (lambda: device.reserve(100), r"cuMemAddressReserve\(_, 100, 0, 0, 0"),
            (lambda: device.map(address, PAGE, handle), rf"cuMemMap\(0x[0-9a-f]+, {PAGE}, 0, 0x"),
            (lambda: device.map(address + 4096, 2 * PAGE, handle), r"cuMemMap\(0x[0-9a-f]+1000, "),
            (lambda: device.map(address + 3 * PAGE, 2 * PAGE, handle), r"cuMemMap\("),
            (lambda: device.unmap(address, 2 * PAGE), r"cuMemUnmap\(0x[0-9a-f]+, 4194304"),
            (
                lambda: device.set_access(address, PAGE, writable=True),
                r"cuMemSetAccess\(.*access 3",
            ),
            (lambda: device.export_fd(handle), r"cuMemExportToShareableHandle\(_, 0x[0-9a-f]+, 1"),
            (lambda: device.import_fd(-1), r"cuMemImportFromShareableHandle\("),
            (lambda: device.release(handle + 1), r"cuMemRelease\(0x[0-9a-f]+"),
            (lambda: device.free_address(address, PAGE), r"cuMemAddressFree\(0x[0-9a-f]+, 2097152"),
        ):
            with pytest.raises(DwdpMemoryError, match=rf"^[^(]* failed: {message}.*{invalid}"):
                call()
        with pytest.raises(DwdpMemoryError, match=r"allocating .* \(CUDA_ERROR_OUT_OF_MEMORY\)"):
            device.create(device.total_bytes, handle_type="none")
        with pytest.raises(DwdpMemoryError, match=r"\(CUDA_ERROR_NOT_PERMITTED\)"):
            device.create(PAGE, handle_type="fabric")
        with pytest.raises(DwdpMemoryError, match="a fabric handle of 3 bytes .* must have 64"):
            device.import_fabric(b"abc")
        assert not device.supports_fabric

        device.map(address, 2 * PAGE, handle)
        for call in (
            lambda: device.map(address + PAGE, 2 * PAGE, handle),  # overlaps
            lambda: device.set_access(address, 3 * PAGE, writable=True),  # a gap
            lambda: device.set_access(address, PAGE, writable=True),  # half a mapping
            lambda: device.unmap(address, PAGE),
            lambda: device.free_address(address, 4 * PAGE),  # still mapped
        ):
            with pytest.raises(DwdpMemoryError, match="INVALID_VALUE"):
                call()
        with pytest.raises(TransferError, match=r"cuMemcpyDtoH_v2.*\(CUDA_ERROR_ILLEGAL_ADDRESS\)"):
            device.read(address, 1)
        device.unmap(address, 2 * PAGE)
        device.free_address(address, 4 * PAGE)
        device.release(handle)


def released_memory_lives_while_mapped() -> None:
    with CudaDevice(1) as device:
        free_bytes = device.free_bytes
        address = device.reserve(PAGE)
        handle = device.create(PAGE, handle_type="posix_fd")
        device.map(address, PAGE, handle)
        device.set_access(address, PAGE, writable=True)
        device.release(handle)
        with pytest.raises(DwdpMemoryError, match="INVALID_VALUE"):
            device.release(handle)
        device.write(address, b"still here")
        assert device.read(address, 10) == b"still here"
        assert device.free_bytes == free_bytes - PAGE
        device.unmap(address, PAGE)
        with pytest.raises(DwdpMemoryError, match="INVALID_VALUE"):
            device.unmap(address, PAGE)
        device.free_address(address, PAGE)
        assert device.free_bytes == free_bytes


def read_only_memory_cannot_be_written() -> None:
    with CudaDevice(0) as device, memory(device, PAGE) as (address, _handles):
        device.write(address, b"sealed")
        device.set_access(address, PAGE, writable=False)
        assert device.read(address, 6) == b"sealed"
        with pytest.raises(TransferError, match=r"writing 1 bytes .*CUDA_ERROR_ILLEGAL_ADDRESS"):
            device.write(address, b"x")
        pid = os.fork()
        if pid == 0:
            ctypes.memset(address, 0, 1)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGSEGV


def read_only_access_that_is_refused_has_its_own_error() -> None:
    with CudaDevice(0) as device, memory(device, PAGE) as (address, _handles):
        with pytest.raises(ReadOnlyAccessError, match=r"read-only .*\(CUDA_ERROR_NOT_SUPPORTED\)"):
            device.set_access(address, PAGE, writable=False)
        device.set_access(address, PAGE, writable=True)
        with pytest.raises(DwdpMemoryError) as caught:
            device.set_access(address, 2 * PAGE, writable=True)
        assert not isinstance(caught.value, ReadOnlyAccessError)


def exported_memory_outlives_its_exporter() -> None:
    """A composite of an own and a peer's allocation; the peer is killed before it is read."""
    files = open_files()
    here, there = socket.socketpair()
    pid = os.fork()
    if pid == 0:  # before any driver call in the parent: CUDA does not survive a fork
        here.close()
        _export_and_sleep(there)
    there.close()
    try:
        _data, (fd,), _flags, _address = socket.recv_fds(here, 1, 1)
    finally:
        here.close()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with CudaDevice(0) as device:
        address = device.reserve(2 * PAGE)
        handles = [device.create(PAGE, handle_type="posix_fd"), device.import_fd(fd)]
        os.close(fd)
        for index, handle in enumerate(handles):
            device.map(address + index * PAGE, PAGE, handle)
            device.release(handle)
        device.set_access(address, PAGE, writable=True)
        device.set_access(address + PAGE, PAGE, writable=False)
        device.write(address, b"mine" * (PAGE // 4))
        expected = b"mine" * (PAGE // 4) + b"peer" * (PAGE // 4 - 1) + b"last"
        assert device.read(address, 2 * PAGE) == expected
        device.copy(address, address + PAGE, PAGE)
        assert device.read(address, PAGE) == expected[PAGE:]
        for index in range(2):
            device.unmap(address + index * PAGE, PAGE)
        device.free_address(address, 2 * PAGE)
    assert open_files() == files


def _export_and_sleep(to: socket.socket) -> NoReturn:
    device = CudaDevice(0)
    with memory(device, PAGE) as (address, handles):
        device.write(address, b"peer" * (PAGE // 4))
        device.write(address + PAGE - 4, b"last")
        socket.send_fds(to, [b"x"], [device.export_fd(handles[0])])
        time.sleep(60)
    raise AssertionError("the exporter was not killed")


def fabric_handles_are_passed_as_bytes() -> None:
    with CudaDevice(0) as device, memory(device, PAGE, handle_type="fabric") as (address, handles):
        assert device.supports_fabric
        device.write(address, b"over the fabric")
        name = device.export_fabric(handles[0])
        assert len(name) == 64
        imported = device.import_fabric(name)
        other = device.reserve(PAGE)
        device.map(other, PAGE, imported)
        device.set_access(other, PAGE, writable=False)
        assert device.read(other, 15) == b"over the fabric"
        device.unmap(other, PAGE)
        device.free_address(other, PAGE)
        device.release(imported)


def peers_and_ordinals() -> None:
    with CudaDevice(0) as device:
        assert device.can_access_peer(1)
        with pytest.raises(DwdpMemoryError, match=r"cuDeviceGet\(_, 7\) .*INVALID_DEVICE"):
            device.can_access_peer(7)
    with pytest.raises(TransferError, match=r"opening CUDA device 7 failed: cuDeviceGet\(_, 7\)"):
        CudaDevice(7)


def nothing_is_left_after_close() -> None:
    files = open_files()
    for _ in range(3):
        with CudaDevice(0) as device, memory(device, 2 * PAGE, PAGE) as (address, _handles):
            with CudaCopyQueue(device, poison=True, max_delay_us=100) as queue:
                batch = queue.add_batch([(address, address + 2 * PAGE, PAGE)])
                queue.issue(batch, None)
            queue.close()
            with pytest.raises(AssertionError, match="a copy stream on CUDA device 0 is closed"):
                queue.drain()
    counts = live_objects()
    assert all(count == 0 for count in vars(counts).values()), counts
    assert open_files() == files, "a descriptor was left open"
    with open("/proc/self/maps") as maps:
        assert "memfd:fake-cuda" not in maps.read()


def a_leak_is_noticed() -> None:
    device = CudaDevice(0)
    device.create(PAGE, handle_type="none")
    with pytest.raises(TransferError, match=r"closing CUDA device 0 failed: .*ILLEGAL_STATE"):
        device.close()


# --- the ring ------------------------------------------------------------------------------------


class Ring:
    """Layers in two slots, consumed by copies to an output: the pipeline, without a model."""

    def __init__(self, device: CudaDevice, queue: CudaCopyQueue, address: int) -> None:
        self.device, self.queue = device, queue
        self.sources = address
        self.slots = address + NUM_LAYERS * SLOT_BYTES
        self.outputs = self.slots + 2 * SLOT_BYTES
        self.batches = []
        for layer in range(NUM_LAYERS):
            device.write(self.sources + layer * SLOT_BYTES, self.expected(layer))
            half = SLOT_BYTES // 2
            source, slot = self.sources + layer * SLOT_BYTES, self.slot(layer)
            slices = [(slot, source, half), (slot + half, source + half, half)]
            self.batches.append(queue.add_batch(slices))
        device.write(self.slots, POISON * 2)

    def slot(self, layer: int) -> int:
        return self.slots + layer % 2 * SLOT_BYTES

    @staticmethod
    def expected(layer: int) -> bytes:
        return bytes([layer + 1]) * SLOT_BYTES

    def start(self) -> None:
        self.queue.issue(self.batches[0], None)
        self.queue.issue(self.batches[1], None)

    def refill(self, layer: int) -> None:
        """Issue what follows `layer` in its slot, also around the end of the step."""
        following = (layer + 2) % NUM_LAYERS
        self.queue.issue(self.batches[following], self.batches[layer])

    def consume(self, layer: int, stream: ComputeStream) -> None:
        """What a layer's kernels would do: read the slot."""
        stream.copy(self.outputs + layer * SLOT_BYTES, self.slot(layer), SLOT_BYTES)

    def clear(self) -> None:
        self.device.write(self.outputs, bytes(NUM_LAYERS * SLOT_BYTES))

    def wrong_layers(self) -> list[int]:
        data = self.device.read(self.outputs, NUM_LAYERS * SLOT_BYTES)
        rows = [data[start : start + SLOT_BYTES] for start in range(0, len(data), SLOT_BYTES)]
        return [layer for layer, row in enumerate(rows) if row != self.expected(layer)]


@contextlib.contextmanager
def ring() -> Iterator[tuple[Ring, ComputeStream]]:
    with (
        CudaDevice(0) as device,
        memory(device, PAGE) as (address, _handles),
        CudaCopyQueue(device, poison=True, max_delay_us=1500, seed=3) as queue,
        ComputeStream() as stream,
    ):
        yield Ring(device, queue, address), stream
        stream.synchronize()
        queue.drain()


def eager_step(
    ring: Ring, stream: ComputeStream, *, wait: bool = True, record: bool = True
) -> None:
    for layer, batch in enumerate(ring.batches):
        if wait:
            ring.queue.wait(batch, stream.handle)
        ring.consume(layer, stream)
        if record:
            ring.queue.record(batch, stream.handle)
        ring.refill(layer)


def eager_steps_never_see_poison() -> None:
    with ring() as (layers, stream):
        layers.start()
        for _ in range(10):
            layers.clear()
            eager_step(layers, stream)
            stream.synchronize()
            assert layers.wrong_layers() == []
        assert layers.queue.uses_batch_copy == (os.environ.get("DWDP_FAKE_CUDA_VERSION") is None)


def eager_steps_back_to_back() -> None:
    """The host runs ahead of the device by several steps."""
    with ring() as (layers, stream):
        layers.start()
        layers.clear()
        for _ in range(10):
            eager_step(layers, stream)
        stream.synchronize()
        assert layers.wrong_layers() == []


def without_waiting_poison_is_seen() -> None:
    _control(wait=False, record=True)


def without_recording_a_slot_is_overwritten() -> None:
    _control(wait=True, record=False)


def _control(*, wait: bool, record: bool) -> None:
    with ring() as (layers, stream):
        layers.start()
        layers.queue.drain()
        seen: list[int] = []
        for _ in range(10):
            layers.clear()
            eager_step(layers, stream, wait=wait, record=record)
            stream.synchronize()
            seen += layers.wrong_layers()
        assert seen, "a missing event must show, or the other tests prove nothing"


# --- graphs --------------------------------------------------------------------------------------


def capture_pieces(
    layers: Ring, stream: ComputeStream, *, external: bool = True
) -> list[tuple[Graph, range]]:
    """Three graphs of two layers each, with external nodes for the ring's events."""
    pieces = []
    for start in range(0, NUM_LAYERS, 2):
        stream.begin_capture()
        for layer in range(start, start + 2):
            assert layers.queue.is_capturing(stream.handle)
            if external:
                layers.queue.wait_external(layers.batches[layer], stream.handle)
            layers.consume(layer, stream)
            layers.queue.record_external(layers.batches[layer], stream.handle)
        pieces.append((stream.end_capture(), range(start, start + 2)))
        assert not layers.queue.is_capturing(stream.handle)
    return pieces


def replay_pieces(layers: Ring, stream: ComputeStream, pieces: list[tuple[Graph, range]]) -> None:
    for graph, piece in pieces:
        graph.launch(stream)
        for layer in piece:
            layers.refill(layer)


def piecewise_graphs_with_copies_outside() -> None:
    with ring() as (layers, stream):
        pieces = capture_pieces(layers, stream)
        layers.start()
        for _ in range(6):
            layers.clear()
            replay_pieces(layers, stream, pieces)
            stream.synchronize()
            assert layers.wrong_layers() == []
        layers.clear()
        for _ in range(6):  # back to back, and eager steps in between
            replay_pieces(layers, stream, pieces)
            eager_step(layers, stream)
        stream.synchronize()
        assert layers.wrong_layers() == []
        layers.queue.drain()
        for graph, _piece in pieces:
            graph.close()


def piecewise_graphs_without_waits_see_poison() -> None:
    with ring() as (layers, stream):
        pieces = capture_pieces(layers, stream, external=False)
        layers.start()
        layers.queue.drain()
        seen: list[int] = []
        for _ in range(10):
            layers.clear()
            replay_pieces(layers, stream, pieces)
            stream.synchronize()
            seen += layers.wrong_layers()
        assert seen
        layers.queue.drain()
        for graph, _piece in pieces:
            graph.close()


def capture_full(layers: Ring, stream: ComputeStream) -> Graph:
    """The whole step: external waits for the first two layers, external records of the last two,
    all other copies inside."""
    queue, batches = layers.queue, layers.batches
    stream.begin_capture()
    for layer, batch in enumerate(batches):
        if layer < 2:
            queue.wait_external(batch, stream.handle)
        else:
            queue.capture_fill(batch, batches[layer - 2], stream.handle)
        layers.consume(layer, stream)
        if layer < NUM_LAYERS - 2:
            queue.capture_record(batch, stream.handle)
        else:
            queue.record_external(batch, stream.handle)
    return stream.end_capture()


def replay_full(layers: Ring, stream: ComputeStream, graph: Graph) -> None:
    graph.launch(stream)
    for layer in (NUM_LAYERS - 2, NUM_LAYERS - 1):
        layers.refill(layer)


def full_graph_with_copies_inside() -> None:
    with ring() as (layers, stream):
        graph = capture_full(layers, stream)
        layers.start()
        for _ in range(6):
            layers.clear()
            replay_full(layers, stream, graph)
            stream.synchronize()
            assert layers.wrong_layers() == []
        layers.clear()
        for _ in range(6):
            replay_full(layers, stream, graph)
            eager_step(layers, stream)
        stream.synchronize()
        assert layers.wrong_layers() == []
        layers.queue.drain()
        graph.close()


def misuse_of_a_capture_is_an_error() -> None:
    with ring() as (layers, stream):
        queue, batches = layers.queue, layers.batches
        for call in (
            lambda: queue.wait_external(batches[0], stream.handle),
            lambda: queue.record_external(batches[0], stream.handle),
        ):
            with pytest.raises(TransferError, match=r"\(CUDA_ERROR_INVALID_VALUE\)"):
                call()
        with pytest.raises(TransferError, match=r"marking a consumed slot .* is not capturing"):
            queue.capture_record(batches[0], stream.handle)
        with pytest.raises(TransferError, match=r"filling a slot in a graph: .* is not capturing"):
            queue.capture_fill(batches[2], batches[0], stream.handle)

        graph = capture_full(layers, stream)
        graph.close()
        stream.begin_capture()
        with pytest.raises(
            TransferError, match=r"consumed in the same capture: call capture_record"
        ):
            queue.capture_fill(batches[2], batches[0], stream.handle)
        assert queue.is_done(batches[0]), "asking is allowed during a capture"
        with pytest.raises(TransferError, match=r"\(CUDA_ERROR_STREAM_CAPTURE_ISOLATION\)"):
            queue.wait(batches[0], stream.handle)
        with pytest.raises(TransferError, match=r"an earlier error invalidated"):
            queue.capture_record(batches[0], stream.handle)
        with pytest.raises(TransferError, match=r"\(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED\)"):
            stream.end_capture()
        layers.start()
        eager_step(layers, stream)
        stream.synchronize()
        assert layers.wrong_layers() == [], "a failed capture leaves the queue usable"


def batch_copies_cannot_be_captured() -> None:
    """The copy stream joins a capture; a fill issued as usual is refused and seen to be."""
    with ring() as (layers, stream):
        queue, batches = layers.queue, layers.batches
        stream.begin_capture()
        queue.capture_record(batches[0], stream.handle)
        queue.capture_fill(batches[2], batches[0], stream.handle)
        with pytest.raises(
            TransferError,
            match=r"issuing copies failed: cuMemcpyBatchAsync\(2 copies, 0x[0-9a-f]+\) returned 900 "
            r"\(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED\)",
        ):
            queue.issue(batches[3], None)
        with pytest.raises(TransferError, match=r"\(CUDA_ERROR_STREAM_CAPTURE_UNJOINED\)"):
            stream.end_capture()  # the poison of the refused fill


def a_bad_copy_is_named() -> None:
    with CudaDevice(0) as device, CudaCopyQueue(device) as queue:
        batch = queue.add_batch([(0x1000, 0x2000, 0), (0x3000, 0, 5)])
        with pytest.raises(
            TransferError,
            match=r"cuMemcpyBatchAsync\(2 copies, .*\), copy 1 \(0x3000, 0, 5\), returned 1 \(CUDA_",
        ):
            queue.issue(batch, None)


def the_default_stream_in_another_thread() -> None:
    """A thread without a current context, and compute on the legacy default stream."""
    with ring() as (layers, _stream), ComputeStream(default=True) as stream:
        assert stream.handle == 0
        wrong: list[object] = []

        def steps() -> None:
            try:
                layers.start()
                for _ in range(10):
                    eager_step(layers, stream)
                    stream.synchronize()
                    wrong.extend(layers.wrong_layers())
            except BaseException as error:
                wrong.append(error)

        thread = threading.Thread(target=steps)
        thread.start()
        thread.join()
        assert wrong == []


def an_empty_batch_is_ready() -> None:
    with CudaDevice(0) as device, CudaCopyQueue(device) as queue:
        batch = queue.add_batch([])
        queue.issue(batch, batch)
        queue.drain()
        assert queue.is_done(batch)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    print("ok")
