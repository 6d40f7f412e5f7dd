"""The holder of `launch`: what it says, and when there is none."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.multiprocess.pair import Pair
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.distributed.endpoint import HOLDER
from vllm_dwdp.distributed.meeting import parse_endpoint
from vllm_dwdp.entrypoints.cli.status import find_ranks, needs_attention
from vllm_dwdp.entrypoints.launch import holding as launch_holding
from vllm_dwdp.entrypoints.launch.holding import expert_holder

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(60)]


def test_launch_says_what_it_holds_and_status_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_holding, "LOOK_INTERVAL_S", 0.05)
    place = f"unix://{tmp_path}/meet"
    config = DwdpConfig(group_size=2, rendezvous=place)
    lines: list[str] = []
    with expert_holder(config, 1, lines.append) as holder:
        first = Pair(parse_endpoint(place))
        deadline = time.monotonic() + 20
        while "of ranks [0, 1]" not in "".join(lines):
            lines += holder.news()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        found = find_ranks(place, secret_file=None, group_size=1, num_groups=1)
        assert [entry["dwdp_rank"] for entry in found] == [HOLDER, 0, 1]
        assert found[0]["state"] == "holding"
        assert not needs_attention(found)
        shown = subprocess.run(
            [sys.executable, "-m", "vllm_dwdp.entrypoints.cli.main", "status", place],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=os.environ | {"COLUMNS": "200"},
        ).stdout
        assert "the holder of group 0 keeps the experts of ranks [0, 1]" in shown
        first.end()
        left = find_ranks(place, secret_file=None, group_size=1, num_groups=1)
        assert needs_attention(left), "a holder is no rank"
    assert lines[-1] == "holder of group 0: keeps 0.00001 GiB of experts, of ranks [0, 1]"
    assert not list((tmp_path / "meet").iterdir())


@pytest.mark.parametrize("options", [{"mode": "replica"}, {"group_size": 1}])
def test_nothing_is_held_of_ranks_that_share_nothing(
    options: dict[str, object], tmp_path: Path
) -> None:
    config = DwdpConfig(**({"group_size": 2, "rendezvous": f"unix://{tmp_path}/meet"} | options))  # type: ignore[arg-type]
    with expert_holder(config, 1, print):
        assert not (tmp_path / "meet").exists()


def test_fabric_handles_are_not_held(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s" * 32)
    secret.chmod(0o600)
    config = DwdpConfig(
        group_size=2, rendezvous="tcp://127.0.0.1:7000", rendezvous_secret_file=str(secret)
    )
    lines: list[str] = []
    with expert_holder(config, 1, lines.append) as holder:
        assert holder.news() == []
    assert lines == [
        "no holder: the CUDA fabric handles that travel at tcp://127.0.0.1:7000 keep nothing alive"
    ]


def test_holding_needs_neither_torch_nor_vllm() -> None:
    script = (
        "import sys, vllm_dwdp.entrypoints.launch.launcher, vllm_dwdp.entrypoints.launch.holding; "
        "print([name for name in ('vllm', 'torch', 'numpy') if name in sys.modules])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert ended.stdout.strip() == "[]"
