"""Ranks in processes of their own, on machines whose drivers pass memory in other ways. NOT A GPU."""

import subprocess
import sys

import pytest

from gpu_checks.fake import simulated_environment

MEET = "from gpu_checks.ranks import ranks_meet; print(ranks_meet(''))"


@pytest.mark.multiprocess
@pytest.mark.timeout(240)
@pytest.mark.parametrize("posix", [0, 1, 2])
def test_ranks_of_one_host_meet_where_fabric_handles_work(posix: int) -> None:
    """As on a GB200; descriptors are not made, not imported, or work as well."""
    ended = subprocess.run(
        [sys.executable, "-c", MEET],
        env=simulated_environment(fabric=1, posix=posix),
        check=False,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert "as seen by 3 ranks" in ended.stdout, ended.stderr
    assert ("by its CUDA fabric handles" in ended.stderr) == (posix == 1)
