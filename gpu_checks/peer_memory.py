"""Questions about memory of another process: what a kill leaves of it, and whether it can be read-only.

Each function that `gpu_checks.questions` names is one question: it returns what it found, and fails by
an exception.
"""

import contextlib

import torch

from gpu_checks.accelerator import Accelerator, accelerator
from gpu_checks.driver_memory import PAGE, exported_content, exporter, imported, open_files
from gpu_checks.views import check_writable_peers
from vllm_dwdp.device.cuda_driver import AccessRefusedError, CudaDevice
from vllm_dwdp.device.tensor import tensor_at
from vllm_dwdp.errors import TransferError


def holds(address: int, pattern: int, gpu: Accelerator) -> bool:
    """Return whether kernels read what the exporter wrote."""
    pages = tensor_at(address, torch.uint8, (2 * PAGE,), gpu.device)
    expected = torch.frombuffer(bytearray(exported_content(pattern)), dtype=torch.uint8)
    return bool(torch.equal(pages, expected.to(gpu.device)))


def killed_exporter() -> str:
    """Read a peer's pages before and after `kill -9`: mapped already, and imported after it."""
    gpu = accelerator()
    with CudaDevice(0) as device, exporter(77) as (process, fd):
        with imported(device, fd, writable=True) as address:
            assert holds(address, 77, gpu), "read wrong before the kill"
            process.kill()
            process.wait()
            filler = [
                torch.full((PAGE,), 3, dtype=torch.uint8, device=gpu.device) for _ in "x" * 64
            ]
            assert holds(address, 77, gpu), "what was mapped is lost with its exporter"
            del filler
        access = composite_with_a_peer(device, fd, 77)
        files = open_files()
        assert composite_with_a_peer(device, fd, 77) == access
        assert open_files() == files, "a descriptor was left open"
    return f"read before, mapped after and imported after the kill; in a composite, mapped {access}"


def composite_with_a_peer(device: CudaDevice, fd: int, pattern: int) -> str:
    """Map an own page and an exporter's two as one range; return how the latter were mapped."""
    peer = exported_content(pattern)
    address = device.reserve(3 * PAGE)
    handles = [device.create(PAGE, handle_type="posix_fd"), device.import_fd(fd)]
    device.map(address, PAGE, handles[0])
    device.map(address + PAGE, 2 * PAGE, handles[1])
    for handle in handles:
        device.release(handle)
    device.set_access(address, PAGE, writable=True)
    access = "read-only"
    try:
        device.set_access(address + PAGE, 2 * PAGE, writable=False)
    except AccessRefusedError:
        access = "writable, as the driver refuses read-only access"
        device.set_access(address + PAGE, 2 * PAGE, writable=True)
    device.write(address, b"mine" * (PAGE // 4))
    assert device.read(address, 3 * PAGE) == b"mine" * (PAGE // 4) + peer, (
        "imported, but read wrong"
    )
    device.copy(address, address + 2 * PAGE, PAGE)
    assert device.read(address, PAGE) == peer[PAGE:], "copied wrong from a peer's page to an own"
    device.unmap(address, PAGE)
    device.unmap(address + PAGE, 2 * PAGE)
    device.free_address(address, 3 * PAGE)
    return access


_kept: list[object] = []


def read_only_peers() -> str:
    """Check views over writable peers, then find out whether this driver needs them."""
    gpu = accelerator()
    check_writable_peers(gpu)
    device = CudaDevice(0)
    with exporter(78) as (_process, fd), contextlib.ExitStack() as stack:
        try:
            address = stack.enter_context(imported(device, fd, writable=False))
        except AccessRefusedError as error:
            return f"read-only is refused, the product maps peers writable: {error}"
        assert holds(address, 78, gpu), "mapped read-only, but read wrong"
        _kept.append(stack.pop_all())  # after the fault this process can give nothing back
        try:
            if gpu.is_real:
                tensor_at(address, torch.uint8, (2 * PAGE,), gpu.device).fill_(1)
                gpu.synchronize()
            else:
                device.write(address, b"x")
        except (RuntimeError, TransferError) as error:
            reason = str(error).splitlines()[0][:150]
            return f"read-only is allowed, and a write faults: {reason}"
        return "read-only is allowed, but a write goes through: no protection"
