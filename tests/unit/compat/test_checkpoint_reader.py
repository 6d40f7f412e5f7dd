"""What of a checkpoint is read: asked of the kernel, which knows the pages that were touched."""

import ctypes
import mmap
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vllm_dwdp.compat.worker.checkpoint_reader import DTYPES, MappedSafetensors
from vllm_dwdp.model_executor.raw_parameters import bytes_of

MIB = 2**20
ROW_BYTES = 8 * MIB
FAULT_AROUND = 6 * MIB
"""So much more than what was touched may the kernel map: a large page of 2 MiB at the header and at
each end of what was read."""


def touched_bytes(path: Path) -> int:
    """Bytes of a file that this process has touched through its mappings.

    Not what was read from the disk, which depends on how far this machine's kernel reads ahead.
    """
    kib, here = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, value = line.partition(" ")
        if not name.endswith(":"):
            here = line.endswith(str(path))
        elif here and name == "Rss:":
            kib += int(value.split()[0])
    return kib * 1024


def cached_bytes(path: Path) -> int:
    """Bytes of a file that are in the page cache."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        pages = np.frombuffer(mapping, np.uint8)
        states = np.empty(-(-pages.size // mmap.PAGESIZE), np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        error = libc.mincore(
            ctypes.c_void_p(pages.ctypes.data),
            ctypes.c_size_t(pages.size),
            states.ctypes.data_as(ctypes.c_void_p),
        )
        assert error == 0
        num_bytes = int((states & 1).sum()) * mmap.PAGESIZE
        del pages
    return num_bytes


def drop(path: Path) -> None:
    """Take a file out of the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_of_a_fused_tensor_only_the_rows_that_are_copied_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    fused = torch.arange(16 * ROW_BYTES // 4, dtype=torch.float32).view(16, -1)
    save_file({"layers.0.experts.gate_up_proj": fused}, path)
    with MappedSafetensors(safe_open(path, "pt"), str(path)) as file:
        tensor = file.get_tensor("layers.0.experts.gate_up_proj")
        assert touched_bytes(path) <= FAULT_AROUND, "the header"
        rows = tensor[8:12].clone()
        assert torch.equal(rows, fused[8:12])
        assert 4 * ROW_BYTES <= touched_bytes(path) <= 4 * ROW_BYTES + FAULT_AROUND


def test_of_tensors_that_are_handed_out_only_those_that_are_copied_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    names = [f"layers.0.experts.{expert}.up_proj.weight" for expert in range(64)]
    save_file({name: torch.full((2 * MIB // 4,), 1.5) for name in names}, path)
    with MappedSafetensors(safe_open(path, "pt"), str(path)) as file:
        tensors = [file.get_tensor(name) for name in names]
        assert touched_bytes(path) <= FAULT_AROUND, "the header"
        assert all((tensor == 1.5).all() for tensor in tensors[16:32])
        assert 32 * MIB <= touched_bytes(path) <= 32 * MIB + FAULT_AROUND


def test_safetensors_itself_reads_every_tensor_that_it_hands_out(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    names = [str(expert) for expert in range(16)]
    save_file({name: torch.full((2 * MIB // 4,), 1.5) for name in names}, path)
    drop(path)
    if cached_bytes(path):
        pytest.skip("the file system of tmp_path keeps its files in memory")
    with safe_open(path, "pt") as stock:
        kept = [stock.get_tensor(name) for name in names]
        time.sleep(0.5)
        assert cached_bytes(path) > 25 * MIB, "safetensors has become lazy: the mapping can go"
        del kept


def test_what_a_loader_writes_does_not_reach_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"experts.0.up": torch.ones(3), "layers.0.experts.0.up": torch.ones(3)}, path)
    before = path.read_bytes()
    with MappedSafetensors(safe_open(path, "pt"), str(path)) as file:
        for name in file.keys():  # noqa: SIM118
            file.get_tensor(name).zero_()
    assert path.read_bytes() == before


def test_every_type_reads_as_ever(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    codes = torch.arange(64, dtype=torch.uint8)
    types = [*DTYPES.values(), torch.int64, torch.float64, torch.bool]
    tensors = {
        f"layers.0.experts.{dtype}": (codes > 5)
        if dtype is torch.bool
        else codes.clone().view(dtype)
        for dtype in types
    }
    tensors["layers.0.experts.scalar"] = torch.tensor(2.5)
    save_file(tensors, path)
    with MappedSafetensors(safe_open(path, "pt"), str(path)) as file:
        for name, expected in tensors.items():
            found = file.get_tensor(name)
            assert found.dtype is expected.dtype and found.shape == expected.shape, name
            assert torch.equal(bytes_of(found), bytes_of(expected)), name


def test_misaligned_tensors_are_read_as_ever(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    header = b'{"layers.0.experts.0.up":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}  \n'
    content = np.array([1.5, -2.0], np.float32)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content.tobytes())
    assert (8 + len(header)) % 4, "the data would be aligned"
    with MappedSafetensors(safe_open(path, "pt"), str(path)) as file:
        assert file.get_tensor("layers.0.experts.0.up").tolist() == [1.5, -2.0]
