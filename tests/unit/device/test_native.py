"""The native copy queue through its typed face, and its errors."""

import ctypes
import itertools
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_dwdp.device import native
from vllm_dwdp.device.host_queue import HostCopyQueue
from vllm_dwdp.errors import NativeLibraryError


@pytest.fixture
def unloaded() -> Iterator[None]:
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def buffers(num_bytes: int) -> tuple[ctypes.Array[ctypes.c_char], ctypes.Array[ctypes.c_char]]:
    source = ctypes.create_string_buffer(random.Random(0).randbytes(num_bytes), num_bytes)
    return source, ctypes.create_string_buffer(num_bytes)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_batch_arrives_whole_whatever_its_slices(num_threads: int) -> None:
    source, target = buffers(300_001)
    cuts = sorted({0, 300_001, *random.Random(1).sample(range(300_001), 40)})
    slices = [
        (ctypes.addressof(target) + start, ctypes.addressof(source) + start, stop - start)
        for start, stop in itertools.pairwise(cuts)
    ]
    with HostCopyQueue(num_threads) as queue:
        batch = queue.add_batch([slices[:7], slices[7:]])
        for _ in range(50):
            ctypes.memset(target, 0, len(target))
            queue.issue(batch)
            queue.wait(batch)
            assert target.raw == source.raw
        assert queue.busy_seconds > 0


def test_waiting_for_a_late_copy_sleeps_and_says_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = buffers(100)
    queue = native.NativeQueue(1, max_delay_us=20_000, seed=3)
    batch = queue.add_batch([[(ctypes.addressof(target), ctypes.addressof(source), 100)] * 20])
    queue.issue(batch)
    assert not queue.is_done(batch)
    started = time.perf_counter()
    slept = queue.wait(batch)
    assert 0 < slept <= time.perf_counter() - started
    assert queue.is_done(batch)
    assert queue.wait(batch) == 0.0, "a finished fill is not waited for"
    queue.close()
    queue.close()


def test_poison_overwrites_a_slot_before_it_is_filled() -> None:
    source, target = buffers(64)
    queue = native.NativeQueue(1, poison=True, max_delay_us=200_000, seed=1)
    slices = [(ctypes.addressof(target), ctypes.addressof(source), 64)]
    batch = queue.add_batch([slices])
    queue.issue(batch)
    seen = target.raw
    queue.wait(batch)
    assert target.raw == source.raw
    assert seen in (b"\xff" * 64, source.raw)
    assert seen == b"\xff" * 64, "the copy was delayed, so the poison must show"
    queue.close()


def test_closing_finishes_what_was_issued() -> None:
    source, target = buffers(1 << 20)
    queue = native.NativeQueue(2)
    queue.issue(queue.add_batch([[(ctypes.addressof(target), ctypes.addressof(source), 1 << 20)]]))
    queue.close()
    assert target.raw == source.raw


def test_an_empty_batch_is_complete_at_once() -> None:
    with HostCopyQueue(1) as queue:
        batch = queue.add_batch([])
        queue.issue(batch)
        assert queue.is_done(batch)
        queue.drain()


def test_a_missing_library_says_how_to_build_it(
    unloaded: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(native, "LIBRARY_PATH", tmp_path / "libdwdp.so")
    with pytest.raises(NativeLibraryError, match=r"is not built\. .*make native"):
        native.library()


def test_a_broken_library_says_how_to_build_it(
    unloaded: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "libdwdp.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(native, "LIBRARY_PATH", broken)
    with pytest.raises(NativeLibraryError, match=r"cannot be loaded: .*make native"):
        native.library()


def test_a_library_of_another_version_is_refused(
    unloaded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "ABI_VERSION", native.ABI_VERSION + 1)
    with pytest.raises(NativeLibraryError, match=r"has ABI \d+, this version needs"):
        native.library()
