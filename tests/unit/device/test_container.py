"""How much memory a container still leaves: files that were just read are no memory in use."""

from pathlib import Path

import pytest

from vllm_dwdp.device import container
from vllm_dwdp.device.container import read_free_memory

GIB = 2**30


def write(folder: Path, **files: str | int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_cgroup_2_counts_a_checkpoint_that_was_just_read_as_free(tmp_path: Path) -> None:
    pod = tmp_path / "kubepods" / "pod1"
    write(pod, memory__max="max", memory__current=60 * GIB)
    stat = f"anon {4 * GIB}\nshmem {8 * GIB}\ninactive_file {40 * GIB}\nactive_file {10 * GIB}"
    write(
        tmp_path / "kubepods",
        memory__max=64 * GIB,
        memory__current=62 * GIB,
        memory__stat=stat,
    )
    write(tmp_path, cgroup="0::/kubepods/pod1")
    assert read_free_memory(tmp_path, tmp_path / "cgroup") == 52 * GIB


def test_cgroup_1(tmp_path: Path) -> None:
    write(
        tmp_path / "memory" / "docker",
        memory__limit_in_bytes=8 * GIB,
        memory__usage_in_bytes=7 * GIB,
        memory__stat=f"inactive_file 1\ntotal_inactive_file {2 * GIB}\ntotal_active_file {GIB}",
    )
    write(tmp_path, cgroup="4:memory:/docker")
    assert read_free_memory(tmp_path, tmp_path / "cgroup") == 4 * GIB


def test_the_tightest_folder_on_the_way_up_decides(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b", memory__max=9 * GIB, memory__current=GIB)
    write(tmp_path / "a", memory__max=10 * GIB, memory__current=7 * GIB)
    write(tmp_path, cgroup="0::/a/b")
    assert read_free_memory(tmp_path, tmp_path / "cgroup") == 3 * GIB


@pytest.mark.parametrize("content", ["max", str(container.UNLIMITED_BYTES), ""])
def test_no_limit(content: str, tmp_path: Path) -> None:
    write(tmp_path / "a", memory__max=content, memory__current=GIB)
    write(tmp_path, cgroup="0::/a")
    assert read_free_memory(tmp_path, tmp_path / "cgroup") is None
