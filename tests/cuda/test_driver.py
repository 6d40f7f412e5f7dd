"""The driver wrapper's memory: every rule of the reference, and who owns what."""

import ctypes
import faulthandler
import os
import signal

import pytest

from gpu_checks import peer_memory
from gpu_checks.driver_memory import PAGE, mapped
from gpu_checks.fake import SIMULATED_ENV, fake_settings, live_objects
from vllm_dwdp.device.cuda_copies import CudaCopyQueue
from vllm_dwdp.device.cuda_driver import AccessRefusedError, CudaDevice
from vllm_dwdp.errors import DwdpMemoryError, TransferError


def test_every_broken_rule_is_an_error_that_names_call_arguments_and_result() -> None:
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
        assert not device.makes_handles("fabric")

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


def test_released_memory_lives_while_it_is_mapped() -> None:
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


def test_read_only_memory_cannot_be_written() -> None:
    with CudaDevice(0) as device, mapped(device, PAGE) as (address, _handles):
        device.write(address, b"sealed")
        device.set_access(address, PAGE, writable=False)
        assert device.read(address, 6) == b"sealed"
        with pytest.raises(TransferError, match=r"writing 1 bytes .*CUDA_ERROR_ILLEGAL_ADDRESS"):
            device.write(address, b"x")
        pid = os.fork()
        if pid == 0:
            faulthandler.disable()
            ctypes.memset(address, 0, 1)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGSEGV


def test_an_illegal_address_ends_with_the_context() -> None:
    """Or one test would fail all that follow it."""
    with CudaDevice(0) as device:
        address = device.reserve(PAGE)
        with pytest.raises(TransferError, match="ILLEGAL_ADDRESS"):
            device.read(address, 1)
        device.free_address(address, PAGE)
    with CudaDevice(0) as device, mapped(device, PAGE) as (address, _handles):
        device.write(address, b"x")


def test_read_only_access_that_is_refused_has_its_own_error() -> None:
    with (
        fake_settings(read_only=0),
        CudaDevice(0) as device,
        mapped(device, PAGE) as (address, _handles),
    ):
        with pytest.raises(AccessRefusedError, match=r"read-only .*\(CUDA_ERROR_NOT_SUPPORTED\)"):
            device.set_access(address, PAGE, writable=False)
        device.set_access(address, PAGE, writable=True)
        with pytest.raises(AccessRefusedError, match=r"read and write .*INVALID_VALUE"):
            device.set_access(address, 2 * PAGE, writable=True)


@pytest.mark.multiprocess
@pytest.mark.parametrize("read_only", [1, 0])
def test_exported_memory_outlives_its_exporter(
    read_only: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SIMULATED_ENV, "1")
    with fake_settings(read_only=read_only):
        said = peer_memory.killed_exporter()
    assert said.endswith("mapped read-only") == bool(read_only)


def test_fabric_handles_are_passed_as_bytes() -> None:
    with (
        fake_settings(fabric=1),
        CudaDevice(0) as device,
        mapped(device, PAGE, handle_type="fabric") as (address, handles),
    ):
        assert device.makes_handles("fabric")
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


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(TransferError, match=r"opening CUDA device 7 failed: cuDeviceGet\(_, 7\)"):
        CudaDevice(7)


def test_nothing_is_left_after_close() -> None:
    for _ in range(3):
        with CudaDevice(0) as device, mapped(device, 2 * PAGE, PAGE) as (address, _handles):
            with CudaCopyQueue(device, poison=True, max_delay_us=100) as queue:
                batch = queue.add_batch([[(address, address + 2 * PAGE, PAGE)]])
                queue.issue(batch, None)
            queue.close()
            with pytest.raises(AssertionError, match="a copy stream on CUDA device 0 is closed"):
                queue.drain()
    with open("/proc/self/maps") as maps:  # counts and descriptors: the fixture
        assert "memfd:fake-cuda-" not in maps.read()


def test_a_leak_is_noticed() -> None:
    device = CudaDevice(0)
    handle = device.create(PAGE, handle_type="none")
    with pytest.raises(TransferError, match=r"closing CUDA device 0 failed: .*ILLEGAL_STATE"):
        device.close()
    assert live_objects().handles == 1
    with CudaDevice(0) as other:
        other.release(handle)
