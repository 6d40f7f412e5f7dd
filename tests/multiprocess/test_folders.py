"""Folders that ranks meet in, in every bad state: one clear error each, or the right behaviour."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.multiprocess.members import publish, rank, run_rank
from tests.unit.distributed.test_messages import fingerprint
from vllm_dwdp.distributed.meeting import parse_endpoint
from vllm_dwdp.errors import PeerMismatchError, RendezvousError

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.timeout(60),
    pytest.mark.usefixtures("nothing_leaks"),
]


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """Yield a small file system at `folder`; skips where it cannot be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "dwdp-test", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_read_only_folder(tmp_path: Path) -> None:
    folder = tmp_path / "meet"
    with (
        mounted(folder, "ro,mode=0700"),
        pytest.raises(RendezvousError, match=r"Read-only file system.*Choose another .*writable"),
    ):
        rank(parse_endpoint(f"unix://{folder}"), 0)


def test_a_folder_on_a_read_only_file_system(tmp_path: Path) -> None:
    folder = tmp_path / "root"
    with (
        mounted(folder, "ro,mode=0700"),
        pytest.raises(RendezvousError, match=r"cannot be made: .*Read-only .*a writable folder"),
    ):
        rank(parse_endpoint(f"unix://{folder}/meet"), 0)


def test_a_folder_on_a_full_disk(tmp_path: Path) -> None:
    folder = tmp_path / "meet"
    with mounted(folder, "size=64k,nr_inodes=3,mode=0700"):
        with rank(parse_endpoint(f"unix://{folder}"), 0):
            assert [path.name for path in folder.iterdir()] == ["g0-r0.sock"]
        (folder / "a").touch()
        (folder / "b").touch()
        with pytest.raises(RendezvousError, match=r"No space left on device.*free space"):
            rank(parse_endpoint(f"unix://{folder}"), 0)
        assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]


def test_what_a_crash_left_is_taken_over(tmp_path: Path) -> None:
    """The socket of a killed rank, and that of one killed while it took its place."""
    place = f"unix://{tmp_path}/meet"
    victim = multiprocessing.get_context("spawn").Process(target=run_rank, args=(place, 1))
    member = rank(parse_endpoint(place), 0)
    page = publish(member)
    victim.start()
    for shard in member.meet().values():
        shard.close()
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    victim.close()
    folder = tmp_path / "meet"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as crashed:
        crashed.bind(f"{folder}/g0-r1.sock.new")
    with rank(parse_endpoint(place), 1):
        assert member.peers()[1].state != "dead"
        assert sorted(path.name for path in folder.iterdir()) == ["g0-r0.sock", "g0-r1.sock"]
    member.close()
    os.close(page)
    assert not list(folder.iterdir())


def test_of_many_that_want_to_be_one_rank_one_is(tmp_path: Path) -> None:
    """Also when a crashed one's socket lies there: nobody takes a living rank for a dead one."""
    place = parse_endpoint(f"unix://{tmp_path}/meet")
    os.close(place.listen(0, 0).detach())  # a crash
    assert (tmp_path / "meet" / "g0-r0.sock").exists()

    def listen(_: int) -> socket.socket | str:
        try:
            return place.listen(0, 0)
        except RendezvousError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(listen, range(4)))
    (winner,) = [outcome for outcome in outcomes if isinstance(outcome, socket.socket)]
    for outcome in outcomes:
        assert (
            outcome is winner
            or "already running" in str(outcome)
            or "held the lock" in str(outcome)
        )
    assert place.listening(0, [0], 1.0) == {0}
    winner.close()
    assert not list((tmp_path / "meet").iterdir())


def test_a_lock_that_is_never_given_back_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    from vllm_dwdp.distributed import unix

    monkeypatch.setattr(unix, "LOCK_TIMEOUT_S", 0.2)
    folder = tmp_path / "meet"
    folder.mkdir(mode=0o700)
    held = os.open(folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(RendezvousError, match="another process has held the lock of .*meet"):
        rank(parse_endpoint(f"unix://{folder}"), 0)
    os.close(held)


def test_two_deployments_in_one_folder(tmp_path: Path) -> None:
    """One of another model is refused on both sides; one of the same model finds the place taken."""
    place = parse_endpoint(f"unix://{tmp_path}/meet")
    ours = rank(place, 0)
    page = publish(ours)
    with pytest.raises(PeerMismatchError, match="config_digest is"):
        rank(place, 1, fingerprint=fingerprint(config_digest="another model"))
    with pytest.raises(PeerMismatchError, match="config_digest is"):
        ours.meet()
    with pytest.raises(RendezvousError, match="rank 0 of group 0 is already running at unix://"):
        rank(place, 0)
    ours.close()
    os.close(page)


def test_groups_share_a_folder_without_meeting(tmp_path: Path) -> None:
    place = parse_endpoint(f"unix://{tmp_path}/meet")
    listeners = [place.listen(group, 0) for group in (0, 1)]
    assert place.listening(0, [0, 1], 1.0) == {0}
    names = sorted(path.name for path in (tmp_path / "meet").iterdir())
    assert names == ["g0-r0.sock", "g1-r0.sock"]
    for listener in listeners:
        listener.close()


class Container:
    """A rank with PIDs, network, IPC and mounts of its own; it shares nothing but the folder."""

    NAMESPACES = ("--pid", "--net", "--ipc", "--uts", "--mount-proc", "--fork", "--kill-child")

    def __init__(self, folder: Path, number: int) -> None:
        self.process = subprocess.Popen(
            ["unshare", *self.NAMESPACES, sys.executable]
            + ["-m", "tests.multiprocess.contained_rank", str(folder), str(number)],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        said: dict[str, Any] = json.loads(self.process.stdout.readline())
        return said

    def ask(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.hear()

    def end(self) -> None:
        """As a container runtime does after its patience: SIGKILL to all of it."""
        self.process.kill()
        self.process.communicate()


def test_ranks_in_containers_share_memory_and_outlive_each_other(tmp_path: Path) -> None:
    """Descriptors travel between PID namespaces, and a new container adopts the old one's memory."""
    probe = ["unshare", *Container.NAMESPACES, "true"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("namespaces cannot be made here")
    folder = tmp_path / "meet"
    containers = [Container(folder, number) for number in (0, 1)]
    try:
        for number, container in enumerate(containers):
            said = container.hear()
            assert said["pid"] == 1, "it has PIDs of its own"
            assert (said["own"], said["peer"]) == (f"from rank {number}", f"from rank {1 - number}")
            assert (said["adopted"], said["states"]) == (False, ["ready"])
        containers[0].end()
        alone = containers[1].ask()
        assert (alone["peer"], alone["states"]) == ("from rank 0", ["dead"])
        containers[0] = Container(folder, 0)
        back = containers[0].hear()
        assert (back["own"], back["adopted"]) == ("from rank 0", True)
        assert containers[1].ask()["states"] == ["ready"]
    finally:
        for container in containers:
            container.end()
