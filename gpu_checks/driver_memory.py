"""Device memory straight from the driver wrapper, also of another process, for checks without a model.

Run as a module, this file is that other process: it exports two pages and waits to be killed. Needs no
torch.
"""

import contextlib
import ctypes
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from vllm_dwdp.device.cuda_driver import CudaDevice, HandleType

ROOT = Path(__file__).parents[1]
PAGE = 2 * 2**20
LAST = b"last"


@contextlib.contextmanager
def mapped(
    device: CudaDevice, *sizes: int, handle_type: HandleType = "posix_fd"
) -> Iterator[tuple[int, list[int]]]:
    """Map one writable range over several allocations; yield its address and their handles."""
    with contextlib.ExitStack() as stack:
        total = sum(sizes)
        address = device.reserve(total)
        stack.callback(device.free_address, address, total)
        handles = []
        for index, size in enumerate(sizes):
            handle = device.create(size, handle_type=handle_type)
            stack.callback(device.release, handle)
            handles.append(handle)
            start = address + sum(sizes[:index])
            device.map(start, size, handle)
            stack.callback(device.unmap, start, size)
        device.set_access(address, total, writable=True)
        yield address, handles


def open_files() -> int:
    """Count the descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


def driver_call(name: str, *arguments: object) -> int:
    """Return the status of a driver call that the product never makes, in device 0's context."""
    driver, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
    driver.cuInit(0)
    driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
    driver.cuCtxPushCurrent_v2(context)
    try:
        return int(getattr(driver, name)(*arguments))
    finally:
        driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
        driver.cuDevicePrimaryCtxRelease_v2(0)


# --- another process -----------------------------------------------------------------------------


def exported_content(pattern: int) -> bytes:
    """Return what an exporter's two pages hold."""
    return bytes([pattern]) * (2 * PAGE - len(LAST)) + LAST


@contextlib.contextmanager
def exporter(pattern: int, **environment: str) -> Iterator[tuple["subprocess.Popen[bytes]", int]]:
    """Start a process with that environment which holds two pages; yield it and their descriptor."""
    here, there = socket.socketpair()
    with here, there:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(there.fileno()), str(pattern)],
            pass_fds=[there.fileno()],
            cwd=ROOT,
            env=os.environ | environment,
        )
        try:
            there.close()
            here.settimeout(60)
            _data, fds, _flags, _address = socket.recv_fds(here, 1, 1)
            if not fds:
                raise RuntimeError("the exporting process sent no descriptor: see its error above")
            try:
                yield process, fds[0]
            finally:
                os.close(fds[0])
        finally:
            process.kill()
            process.wait()


@contextlib.contextmanager
def imported(device: CudaDevice, fd: int, *, writable: bool) -> Iterator[int]:
    """Map the exporter's pages."""
    handle = device.import_fd(fd)
    address = device.reserve(2 * PAGE)
    device.map(address, 2 * PAGE, handle)
    device.release(handle)
    try:
        device.set_access(address, 2 * PAGE, writable=writable)
        yield address
    finally:
        device.unmap(address, 2 * PAGE)
        device.free_address(address, 2 * PAGE)


def main() -> NoReturn:
    """Export two pages over the socket that was inherited, then wait for the end."""
    fd, pattern = map(int, sys.argv[1:])
    with CudaDevice(0) as device, mapped(device, 2 * PAGE) as (address, handles):
        device.write(address, exported_content(pattern))
        with socket.socket(fileno=fd) as connection:
            socket.send_fds(connection, [b"x"], [device.export_fd(handles[0])])
        time.sleep(120)
    sys.exit("the exporter was not killed")


if __name__ == "__main__":
    main()
