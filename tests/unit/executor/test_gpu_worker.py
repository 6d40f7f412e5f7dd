"""The GPU worker joins its group once, before vLLM measures memory; here on the host device."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.v1.worker.gpu_worker import Worker

from tests.helpers.files import num_open_files
from tests.unit.distributed.test_messages import fingerprint
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.device import freed
from vllm_dwdp.device.base import Device
from vllm_dwdp.device.host import HostDevice
from vllm_dwdp.distributed.launch import DwdpLaunch, RankSpan, Seat
from vllm_dwdp.distributed.meeting import make_abstract_endpoint
from vllm_dwdp.distributed.membership import Membership
from vllm_dwdp.distributed.status import query_status
from vllm_dwdp.errors import RendezvousError
from vllm_dwdp.executor import gpu_worker, identity
from vllm_dwdp.executor.gpu_worker import DwdpGPUWorker


class OpenedDevice(HostDevice):
    """A device that knows how many are open."""

    num_open = 0
    free_bytes = 2**20
    """Of 2**20, as far as the test says."""

    def memory_info(self) -> tuple[int, int]:
        return OpenedDevice.free_bytes, 2**20

    def __init__(self) -> None:
        super().__init__()
        OpenedDevice.num_open += 1

    def close(self) -> None:
        super().close()
        OpenedDevice.num_open -= 1


class HostBackedWorker(DwdpGPUWorker):
    """The product's worker, without a GPU or an engine."""

    def __init__(self, mode: str = "auto") -> None:
        config = DwdpConfig(mode=mode, group_size=2)
        endpoint = make_abstract_endpoint()
        self._launch = DwdpLaunch(config=config, ranks=RankSpan(0, 1, 2), endpoint=endpoint)
        self.vllm_config = SimpleNamespace(cache_config=SimpleNamespace(gpu_memory_utilization=0.5))
        self.num_bytes = -1

    @property
    def seat(self) -> Seat:
        return self._launch.seat(0)

    def make_device(self) -> Device:
        return OpenedDevice()

    def peer(self) -> Membership:
        """Rank 1, which holds nothing of us."""
        return identity.open_membership(self._launch.seat(1), None, 0)

    def state(self) -> str:
        endpoint = self._launch.endpoint
        return str(query_status(endpoint, 0, 0, timeout_s=5)["state"])


@pytest.fixture(autouse=True)
def host_vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """vLLM's `init_device`, as far as it concerns us; nothing may be left of it."""

    def init_device(worker: Any) -> None:
        worker.num_bytes = BaseModelLoader.get_external_weight_memory(worker, None)
        if worker.num_bytes > 2**40:
            raise MemoryError("no room")

    monkeypatch.setattr(Worker, "init_device", init_device)
    monkeypatch.setattr(Worker, "shutdown", lambda worker: None)
    monkeypatch.setattr(identity, "make_fingerprint", lambda *_: fingerprint())
    monkeypatch.setattr(BaseModelLoader, "get_external_weight_memory", lambda *_: 7)
    before = num_open_files()
    yield
    assert (num_open_files(), OpenedDevice.num_open) == (before, 0)


def whole_shard(worker: HostBackedWorker, peer: Membership, num_bytes: int) -> None:
    """Let `peer` hold a shard of an earlier start of `worker`."""
    page = os.memfd_create("page")
    with identity.open_membership(worker.seat, None, 0) as earlier:
        for member in (earlier, peer):
            member.publish([page], [num_bytes])
            member.announce_ready(b"digest")
        for member in (earlier, peer):
            for shard in member.meet().values():
                shard.close()
    os.close(page)


def test_what_a_peer_keeps_is_counted_and_the_same_membership_loads_the_model() -> None:
    worker = HostBackedWorker()
    with worker.peer() as peer:
        whole_shard(worker, peer, 4096)
        worker.init_device()
        assert worker.num_bytes == 7 + 4096
        assert (OpenedDevice.num_open, worker.state()) == (1, "starting")
        with ExitStack() as undo:
            _, membership = worker.open_membership(undo)
            assert OpenedDevice.num_open == 1
            (own,) = membership.recover()
            own.close()
        worker.shutdown()


def test_a_device_without_room_tells_the_peers_and_closes_everything() -> None:
    worker = HostBackedWorker()
    with worker.peer() as peer:
        whole_shard(worker, peer, 2**41)
        with pytest.raises(MemoryError):
            worker.init_device()
        assert peer.status()["last_failure"] == "rank 0 failed to start: MemoryError: no room"


def test_a_worker_that_never_loads_leaves_its_group_when_it_ends() -> None:
    worker = HostBackedWorker()
    worker.init_device()
    assert (worker.num_bytes, worker.state()) == (7, "starting")
    worker.shutdown()
    with pytest.raises(RendezvousError, match="does not listen"):
        worker.state()


def test_a_replica_joins_nothing() -> None:
    worker = HostBackedWorker("replica")
    worker.init_device()
    assert (worker.num_bytes, OpenedDevice.num_open) == (7, 0)


def test_a_vllm_that_does_not_ask_is_joined_while_it_loads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Worker, "init_device", lambda worker: None)
    worker = HostBackedWorker()
    worker.init_device()
    assert OpenedDevice.num_open == 0
    with ExitStack() as undo:
        worker.open_membership(undo)
        assert worker.state() == "starting"


@pytest.mark.parametrize("held_bytes", [0, 4096])
def test_memory_that_the_rank_before_still_holds_is_waited_for(
    held_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's half of the device, without what peers keep for us, which need not be free."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(
        gpu_worker, "wait_until_freed", lambda device, *facts: asked.append(facts) or None
    )
    worker = HostBackedWorker()
    with worker.peer() as peer:
        if held_bytes:
            whole_shard(worker, peer, held_bytes)
        worker.init_device()
        worker.shutdown()
    assert asked == [(2**19 - held_bytes, 0)]


def test_vllm_looks_at_the_memory_when_it_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(OpenedDevice, "free_bytes", 7)
    monkeypatch.setattr(freed, "POLL_S", 0.01)
    monkeypatch.setattr(freed.time, "sleep", lambda seconds: free_all())
    seen: list[int] = []
    before = Worker.init_device

    def init_device(worker: Any) -> None:
        before(worker)
        seen.append(OpenedDevice.free_bytes)

    monkeypatch.setattr(Worker, "init_device", init_device)
    worker = HostBackedWorker()
    worker.init_device()
    worker.shutdown()
    assert seen == [2**20]


def free_all() -> None:
    OpenedDevice.free_bytes = 2**20
