"""Questions about the memory of another GPU: reach, speed in place and by copies, faults.

Each function that `gpu_checks.questions` names is one question: it returns what it found, and fails by
an exception. GPU 0 reads, GPU 1 owns. Over the fake driver both are host memory: there the questions are
asked, and their numbers mean nothing. Run as a module, this file is a process whose kernel faults.
"""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch

from gpu_checks.accelerator import Accelerator, accelerator
from gpu_checks.driver_memory import PAGE, ROOT, exported_content, exporter, imported, mapped
from gpu_checks.peer_memory import holds
from vllm_dwdp.device.cuda_copies import CudaCopyQueue
from vllm_dwdp.device.cuda_driver import AccessRefusedError, CudaDevice
from vllm_dwdp.device.tensor import tensor_at
from vllm_dwdp.errors import DwdpError, DwdpMemoryError

CHUNKS = {"2 MiB": 2**21, "16 MiB": 2**24, "64 MiB": 2**26, "whole": 2**40}
CACHED_RATIO = 1.5
"""From so much faster on, a second read cannot have come over the link."""
SLOWER_RATIO = 1.2
"""What a product may lose before it is said."""
ROUNDS = 5


# --- reach ---------------------------------------------------------------------------------------


def peers_apart() -> str:
    """Import what a process exports that sees GPU 1 only, in this one, which sees GPU 0 only."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = seen[0]  # read when CUDA starts, which is below
    gpu = accelerator()
    if gpu.is_real:
        assert torch.cuda.device_count() == 1, "this process sees the other GPU"
    with CudaDevice(0) as device, exporter(81, CUDA_VISIBLE_DEVICES=seen[1]) as (process, fd):
        access = "read-only"
        try:
            check_import(device, fd, gpu, writable=False)
        except AccessRefusedError:
            access = "writable, as the driver refuses read-only access"
            check_import(device, fd, gpu, writable=True)
        process.kill()
        process.wait()
        check_import(device, fd, gpu, writable=access != "read-only")
    return f"yes, mapped {access}, and after a kill of the owner"


def check_import(device: CudaDevice, fd: int, gpu: Accelerator, *, writable: bool) -> None:
    """Check that kernels here read what the exporter wrote."""
    with imported(device, fd, writable=writable) as address:
        assert holds(address, 81, gpu), "imported, but read wrong"


def mixed_access() -> str:
    """Map own and imported memory as one range, and set access to all of it at once."""
    with CudaDevice(0) as reader, CudaDevice(1) as owner:
        with two_allocations(reader, owner) as (address, _own_bytes, all_bytes):
            found = [
                f"{'writable' if writable else 'read-only'}, one call for both: "
                + attempt(partial(reader.set_access, address, all_bytes, writable=writable))
                for writable in (False, True)
            ]
        with two_allocations(reader, owner) as (address, own_bytes, all_bytes):

            def one_by_one() -> None:
                reader.set_access(address, own_bytes, writable=True)
                reader.set_access(address + own_bytes, all_bytes - own_bytes, writable=True)

            found.append(f"writable, one call for each: {attempt(one_by_one)}")
    return "; ".join(found)


@contextlib.contextmanager
def two_allocations(reader: CudaDevice, owner: CudaDevice) -> Iterator[tuple[int, int, int]]:
    """Map an allocation of each GPU as one range without access: its address, own and all bytes."""
    own_bytes, all_bytes = PAGE, 3 * PAGE
    with contextlib.ExitStack() as stack:
        address = reader.reserve(all_bytes)
        stack.callback(reader.free_address, address, all_bytes)
        own = reader.create(own_bytes, handle_type="posix_fd")
        stack.callback(reader.release, own)
        other = import_from(reader, owner, all_bytes - own_bytes, stack)
        for start, size, handle in ((0, own_bytes, own), (own_bytes, all_bytes - own_bytes, other)):
            reader.map(address + start, size, handle)
            stack.callback(reader.unmap, address + start, size)
        yield address, own_bytes, all_bytes


def import_from(
    reader: CudaDevice, owner: CudaDevice, num_bytes: int, stack: contextlib.ExitStack
) -> int:
    """Allocate on the owner, and return the reader's handle of it, as a peer's is passed."""
    made = owner.create(num_bytes, handle_type="posix_fd")
    stack.callback(owner.release, made)
    fd = owner.export_fd(made)
    try:
        handle = reader.import_fd(fd)
    finally:
        os.close(fd)
    stack.callback(reader.release, handle)
    return handle


@contextlib.contextmanager
def peer_range(reader: CudaDevice, owner: CudaDevice, num_bytes: int) -> Iterator[int]:
    """Map new memory of the owner for the reader; yield its address."""
    with contextlib.ExitStack() as stack:
        handle = import_from(reader, owner, num_bytes, stack)
        address = reader.reserve(num_bytes)
        stack.callback(reader.free_address, address, num_bytes)
        reader.map(address, num_bytes, handle)
        stack.callback(reader.unmap, address, num_bytes)
        reader.set_access(address, num_bytes, writable=True)
        yield address


def attempt(call: Callable[[], object]) -> str:
    """Return whether a call is accepted, and what it says if not."""
    try:
        call()
    except DwdpMemoryError as error:
        return f"refused ({error})"
    return "accepted"


# --- speed ---------------------------------------------------------------------------------------


def in_place_speed() -> str:
    """Time a reduction and a matrix product over weights here and on the other GPU."""
    gpu = accelerator()
    rows, columns = (8192, 16384) if gpu.is_real else (512, 2048)
    num_bytes = 2 * rows * columns
    speeds: dict[str, float] = {}
    with CudaDevice(0) as reader, CudaDevice(1) as owner:
        for where, device in (("own", reader), ("peer's", owner)):
            with peer_range(reader, device, num_bytes) as address:
                weights = tensor_at(address, torch.bfloat16, (rows, columns), gpu.device).zero_()
                for num_tokens in (16, 256):
                    x = torch.ones(num_tokens, rows, dtype=torch.bfloat16, device=gpu.device)
                    product = gbps(gpu, num_bytes, partial(torch.matmul, x, weights))
                    speeds[f"product of {num_tokens} tokens, {where}"] = product
                words = weights.view(torch.int32)
                speeds[f"amax, {where}"] = gbps(gpu, num_bytes, words.amax)
                gpu.synchronize()
                del weights, words
    return judge_in_place(speeds)


def judge_in_place(speeds: Mapping[str, float]) -> str:
    """Say whether `auto`, which times a reduction, may conclude from it to products.

    A product is expected to read a peer as fast as a reduction does, or as fast as it reads own memory.
    """
    found = ", ".join(f"{name} {speed:.0f} GB/s" for name, speed in speeds.items())
    slower = []
    for num_tokens in (16, 256):
        product = f"product of {num_tokens} tokens"
        expected = min(speeds["amax, peer's"], speeds[f"{product}, own"])
        slower.append(expected / speeds[f"{product}, peer's"])
    verdict = (
        f"A PRODUCT READS A PEER {max(slower):.1f} TIMES SLOWER THAN A REDUCTION: `auto` favours direct"
        if max(slower) > SLOWER_RATIO
        else "a product reads a peer as fast as a reduction"
    )
    return f"{verdict} ({found})"


def reread_speed() -> str:
    """Read a little of the other GPU's memory over and over, and much of it once."""
    gpu = accelerator()
    small, large = (2**23, 2**30) if gpu.is_real else (PAGE, 4 * PAGE)
    with (
        CudaDevice(0) as reader,
        CudaDevice(1) as owner,
        peer_range(reader, owner, large) as address,
    ):
        words = tensor_at(address, torch.int32, (large // 4,), gpu.device).zero_()
        parts = list(words.split(small // 4))
        same = [parts[0]] * len(parts)
        again, once = (gbps(gpu, large, partial(reduce_all, tensors)) for tensors in (same, parts))
        gpu.synchronize()
    return judge_rereads(again, once)


def reduce_all(tensors: list[torch.Tensor]) -> None:
    """Read every tensor once."""
    for tensor in tensors:
        tensor.amax()


def judge_rereads(again: float, once: float) -> str:
    """Say whether a second read crosses the link again, as tiles of a product would."""
    kept = again > CACHED_RATIO * once
    verdict = "this GPU's cache keeps them" if kept else "every read of a line crosses the link"
    return f"{verdict}: the same lines again {again:.0f} GB/s, other lines {once:.0f} GB/s"


def gbps(gpu: Accelerator, num_bytes: int, body: Callable[[], object]) -> float:
    """Return the best of some rounds, in GB/s; the first, which may compile, does not count."""
    body()
    gpu.synchronize()
    return num_bytes / 1e6 / min(gpu.milliseconds(body) for _ in range(ROUNDS))


def peer_copy_speed(by: str) -> str:
    """Copy from another GPU in chunks; or from several GPUs at once, each from the next one."""
    gpu = accelerator()
    num_bytes = 2**29 if gpu.is_real else 2 * PAGE
    if by == "chunks":
        speeds = {name: pull_speed([(0, 1)], num_bytes, chunk) for name, chunk in CHUNKS.items()}
        return ", ".join(f"{name} {speed:.0f} GB/s" for name, speed in speeds.items())
    count = torch.cuda.device_count() if gpu.is_real else 2
    pairs = [(reader, (reader + 1) % count) for reader in range(count)]
    found = {
        "one": pull_speed(pairs[:1], num_bytes, CHUNKS["16 MiB"]),
        f"all {count} from the next": pull_speed(pairs, num_bytes, CHUNKS["16 MiB"]),
    }
    if count > 2:
        same = [(reader, 0) for reader in range(1, count)]
        found[f"{count - 1} from one"] = pull_speed(same, num_bytes, CHUNKS["16 MiB"])
    return ", ".join(f"{name} {speed:.0f} GB/s each" for name, speed in found.items())


def pull_speed(pairs: list[tuple[int, int]], num_bytes: int, chunk: int) -> float:
    """Return GB/s of each reader while all `(reader, owner)` copy at once, the slowest counting."""
    with contextlib.ExitStack() as stack:
        pulls = []
        for reader_ordinal, owner_ordinal in pairs:
            reader = stack.enter_context(CudaDevice(reader_ordinal))
            owner = stack.enter_context(CudaDevice(owner_ordinal))
            source = stack.enter_context(peer_range(reader, owner, num_bytes))
            target, _handles = stack.enter_context(mapped(reader, num_bytes))
            queue = stack.enter_context(CudaCopyQueue(reader))
            starts = range(0, num_bytes, chunk)
            slices = [(target + n, source + n, min(chunk, num_bytes - n)) for n in starts]
            pulls.append((queue, queue.add_batch([slices])))
        times = []
        for _ in range(ROUNDS + 1):
            started = time.perf_counter()
            for queue, batch in pulls:
                queue.issue(batch, None)
            for queue, _batch in pulls:
                queue.drain()
            times.append(time.perf_counter() - started)
    return num_bytes / 1e9 / min(times[1:])


# --- faults --------------------------------------------------------------------------------------

_kept: list[object] = []


def fault_spread() -> str:
    """Read memory of a process before its kernel faults, after that, and after its end."""
    gpu = accelerator()
    device = CudaDevice(0)
    stack = contextlib.ExitStack()
    _kept.append(stack)  # if the fault spreads, nothing can be given back
    with faulting_exporter() as (process, fd, connection):
        address = stack.enter_context(imported(device, fd, writable=False))
        found = [f"before {reads(address, gpu)}"]
        connection.sendall(b"fault")
        said = connection.recv(400).decode()
        found.append(f"after its fault ({said}) {reads(address, gpu)}")
        process.kill()
        process.wait()
        found.append(f"after its end {reads(address, gpu)}")
    assert "before right" in found, found
    return judge_fault(found)


def judge_fault(found: list[str]) -> str:
    """Say whether peers survive."""
    spread = any(not each.endswith(" right") for each in found)
    verdict = "THE FAULT SPREADS: peers die with it" if spread else "peers read on"
    return f"{verdict}: {', '.join(found)}"


def reads(address: int, gpu: Accelerator) -> str:
    """Return whether kernels here read right, or what they say."""
    try:
        return "right" if holds(address, 82, gpu) else "wrong"
    except RuntimeError as error:
        return f"fails: {str(error).splitlines()[0][:100]}"


@contextlib.contextmanager
def faulting_exporter() -> Iterator[tuple["subprocess.Popen[bytes]", int, socket.socket]]:
    """Start a process on GPU 1 that exports two pages, and whose kernel faults when it is told to."""
    here, there = socket.socketpair()
    with here, there:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(there.fileno())],
            pass_fds=[there.fileno()],
            cwd=ROOT,
        )
        try:
            there.close()
            here.settimeout(60)
            _data, fds, _flags, _address = socket.recv_fds(here, 1, 1)
            assert fds, "the exporting process sent no descriptor: see its error above"
            try:
                yield process, fds[0], here
            finally:
                os.close(fds[0])
        finally:
            process.kill()
            process.wait()


def main() -> None:
    """Export two pages of GPU 1 over an inherited socket, fault when told to, and wait for the end."""
    is_real = accelerator().is_real
    with CudaDevice(1) as device, mapped(device, 2 * PAGE) as (address, handles):
        device.write(address, exported_content(82))
        nowhere = device.reserve(PAGE)
        with socket.socket(fileno=int(sys.argv[1])) as connection:
            socket.send_fds(connection, [b"x"], [device.export_fd(handles[0])])
            connection.recv(5)
            said = "no fault was seen"
            try:
                if is_real:
                    gpu = torch.device("cuda", 1)
                    torch.cuda.set_device(gpu)
                    tensor_at(nowhere, torch.uint8, (PAGE,), gpu).fill_(1)
                    torch.cuda.synchronize()
                else:
                    device.copy(nowhere, address, PAGE)
            except (RuntimeError, DwdpError) as error:
                said = str(error).splitlines()[0][:300]
            connection.sendall(said.encode())
            time.sleep(120)
    sys.exit("the exporter was not killed")


if __name__ == "__main__":
    main()
