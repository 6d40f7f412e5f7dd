"""What this process may use, as the kernel says it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_dwdp.device import limits

ALLOWED = sorted(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("online", "confined"),
    [("0-{last}", False), ("0-{half},{rest}-{last}", False), ("0-{last},{more}", True)],
)
def test_a_process_is_confined_where_it_may_not_use_some_online_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, online: str, confined: bool
) -> None:
    last = len(ALLOWED) - 1
    half = last // 2
    if half == last:
        pytest.skip("one core")
    said = online.format(last=last, half=half, rest=half + 1, more=last + 4)
    (tmp_path / "online").write_text(f"{said}\n")
    monkeypatch.setattr(limits, "ONLINE_CPUS", tmp_path / "online")
    assert limits.is_confined() is confined


@pytest.mark.skipif(len(ALLOWED) < 2, reason="one core")
def test_taskset_confines() -> None:
    """Also where glibc counts the CPUs that are allowed for those that are there."""
    script = "from vllm_dwdp.device import limits; print(limits.is_confined())"
    command = ["taskset", "-c", str(ALLOWED[-1]), sys.executable, "-c", script]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert said.split() == ["True"]
