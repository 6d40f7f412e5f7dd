"""Where the ranks of the examples meet: folders that only their user can enter."""

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.unit.examples.deployments import (
    COMPOSE,
    DEPLOY,
    KUBERNETES,
    LLM_D,
    compose,
    compose_ranks,
    mounted_at,
    pod_ranks,
    pods,
    rendezvous_of,
    systemd_ranks,
)


@pytest.mark.parametrize("name", [*KUBERNETES, LLM_D])
def test_the_pods_meeting_place_is_made_for_their_user(name: str, tmp_path: Path) -> None:
    """A hostPath is made as root:root 0755, where a rank can make no folder."""
    pod = pods(name)[0]
    user = pod["securityContext"]["runAsUser"]
    (rank,) = pod["containers"]
    folder = rendezvous_of(pod_ranks(tmp_path, name)[0])
    volume = mounted_at(rank["volumeMounts"], folder)
    (kind,) = (each for each in pod["volumes"] if each["name"] == volume)
    assert "hostPath" in kind, "only a folder of the node is shared by pods"
    (maker,) = pod["initContainers"]
    assert maker["securityContext"]["runAsUser"] == 0
    assert mounted_at(maker["volumeMounts"], folder) == volume
    assert maker["command"] == shlex.split(f"install -d -m 700 -o {user} -g {user} {folder}")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives folders away")
def test_a_rank_can_listen_where_the_pod_was_prepared() -> None:
    pod = pods("kubernetes")[0]
    user = pod["securityContext"]["runAsUser"]
    with tempfile.TemporaryDirectory() as host:
        os.chmod(host, 0o755)  # as the kubelet makes it
        folder = Path(host) / "meet"
        command = pod["initContainers"][0]["command"]
        for _ in range(2):  # every pod runs it; the second finds the first one's folder
            subprocess.run([*command[:-1], str(folder)], check=True)
        code = "import os; from vllm_dwdp.distributed.meeting import parse_endpoint; "
        code += f"os.setgid({user}); os.setuid({user}); "
        code += f"listener = parse_endpoint('unix://{folder}').listen(0, 0); "
        code += f"print(os.listdir('{folder}'))"
        command = [sys.executable, "-c", code]
        ended = subprocess.run(command, check=True, timeout=60, capture_output=True, text=True)
        assert ended.stdout.strip() == "['g0-r0.sock']"


@pytest.mark.parametrize("name", COMPOSE)
def test_the_containers_meeting_place_belongs_to_their_user(name: str, tmp_path: Path) -> None:
    content = compose(name)
    made = dict(
        item.split("=") for item in content["volumes"]["meet"]["driver_opts"]["o"].split(",")
    )
    for number, words in enumerate(compose_ranks(tmp_path, name)):
        service = content["services"][f"rank{number}"]
        assert service["user"] == f"{made['uid']}:{made['gid']}"
        mounts = [
            {"name": volume, "mountPath": path}
            for volume, path, *_ in (text.rsplit(":", 2) for text in service["volumes"])
            if volume == "meet"
        ]
        assert mounted_at(mounts, rendezvous_of(words)) == "meet"
    assert int(made["mode"], 8) == 0o700


def test_the_units_meeting_place_belongs_to_their_user(tmp_path: Path) -> None:
    unit = (DEPLOY / "vllm-dwdp@.service").read_text()
    facts = dict(re.findall(r"^(\w+)=(.*)$", unit, re.MULTILINE))
    assert facts["User"] != "root"
    assert facts["RuntimeDirectoryMode"] == "0700"
    assert facts["RuntimeDirectoryPreserve"] == "yes", "the other ranks go on meeting there"
    (words,) = systemd_ranks(tmp_path, "vllm-dwdp@")
    assert rendezvous_of(words).is_relative_to(f"/run/{facts['RuntimeDirectory']}")
