"""How much memory a container still leaves: files that were just read are no memory in use."""

from pathlib import Path

import pytest

from vllm_dwdp.device import container
from vllm_dwdp.device.container import Limits, read_free_memory, read_limits

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


def test_limits_of_cgroup_2_are_the_tightest_on_the_way_up(tmp_path: Path) -> None:
    inner = tmp_path / "kubepods" / "pod1"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (inner / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "kubepods" / "memory.max").write_text("4294967296\n")
    (tmp_path / "kubepods" / "pids.max").write_text("500\n")
    membership = tmp_path / "cgroup"
    membership.write_text("0::/kubepods/pod1\n")
    limits = read_limits(tmp_path, membership)
    assert limits == Limits(memory_bytes=4 * 2**30, num_tasks=500, num_cpus=1.5)


def test_limits_of_cgroup_1(tmp_path: Path) -> None:
    for controller, name, text in (
        ("memory", "memory.limit_in_bytes", "1073741824"),
        ("pids", "pids.max", "max"),
        ("cpu", "cpu.cfs_quota_us", "-1"),
        ("cpu", "cpu.cfs_period_us", "100000"),
    ):
        folder = tmp_path / controller / "docker" / "abc"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text + "\n")
    membership = tmp_path / "cgroup"
    membership.write_text(
        "4:memory:/docker/abc\n3:pids:/docker/abc\n2:cpu,cpuacct:/docker/abc\n0::/docker/abc\n"
    )
    assert read_limits(tmp_path, membership) == Limits(memory_bytes=2**30)
