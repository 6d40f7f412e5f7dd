"""A rank that is attacked, in a process of its own."""

import multiprocessing
import os
import random
import socket
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

from tests.multiprocess.members import rank
from vllm_dwdp.distributed import server
from vllm_dwdp.distributed.connection import PacketConnection
from vllm_dwdp.distributed.meeting import parse_endpoint
from vllm_dwdp.distributed.status import query_status
from vllm_dwdp.distributed.tcp import TcpEndpoint

DEADLINE_S = 1.0


GROWTH_BYTES = 8 * 2**20


def run_victim(text: str, secret: str | None, parent: Connection) -> None:
    server.CONNECTION_DEADLINE_S = DEADLINE_S
    member = rank(parse_endpoint(text, 2, secret), 0)
    member.describe_by(lambda: {"ok": True})
    pages = [os.memfd_create("page") for _ in range(300)]
    member.publish(pages, [4096] * 300, [b"f" * 64] * 300)
    member.announce_ready(b"digest")
    parent.send("ready")
    parent.recv()
    member.close()


class Victim:
    """A rank 0 of 2 with a published shard, in its own process."""

    def __init__(self, text: str, secret: str | None) -> None:
        self.endpoint = parse_endpoint(text, 2, secret)
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=run_victim, args=(text, secret, theirs))
        self._process.start()
        assert self._pipe.poll(30) and self._pipe.recv() == "ready"
        self.seen = psutil.Process(self._process.pid)
        self.random_attack(200, seed=0)  # allocators, log handlers and caches reach their size
        query_status(self.endpoint, 0, 0, timeout_s=5)
        time.sleep(DEADLINE_S + 0.5)
        self._before = self._footprint()

    def _footprint(self) -> tuple[int, int, int, int]:
        maps = Path(f"/proc/{self.seen.pid}/maps").read_text().count("\n")
        return self.seen.num_fds(), self.seen.num_threads(), maps, self.seen.memory_info().rss

    def raw(self) -> socket.socket:
        """Return a connection that has said nothing yet."""
        if isinstance(self.endpoint, TcpEndpoint):
            return socket.create_connection(self.endpoint.address(0, 0), timeout=5)
        connection = self.endpoint.connect(0, 0, timeout_s=5)
        assert isinstance(connection, PacketConnection)
        return connection.sock

    def attack(self, data: bytes, num_fds: int = 0) -> None:
        """Send this, and look whether anything comes back that is no refusal."""
        with self.raw() as connection, suppress(ConnectionError, TimeoutError):
            if num_fds:
                page = os.memfd_create("attack")
                socket.send_fds(connection, [data], [page] * num_fds)
                os.close(page)
            else:
                connection.sendall(data) if self.is_tcp else connection.send(data)

    @property
    def is_tcp(self) -> bool:
        return isinstance(self.endpoint, TcpEndpoint)

    def random_attack(self, num_connections: int, seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(num_connections):
            self.attack(dice.randbytes(dice.choice((1, 8, 72, 104, 500))))

    def must_answer(self) -> None:
        started = time.monotonic()
        assert query_status(self.endpoint, 0, 0, timeout_s=5)["ok"]
        assert time.monotonic() - started < 2, "the answer took too long"

    def must_be_unchanged(self) -> None:
        """After the deadline of its connections it has what it had before, and still answers."""
        deadline = time.monotonic() + DEADLINE_S + 8
        while True:
            num_fds, num_threads, num_maps, rss = self._footprint()
            grown = (num_fds, num_threads) != self._before[:2] or num_maps > self._before[2] + 8
            if not grown and rss - self._before[3] < GROWTH_BYTES:
                break
            assert time.monotonic() < deadline, (self._before, self._footprint())
            time.sleep(0.1)
        self.must_answer()

    def end(self) -> None:
        with suppress(OSError):
            self._pipe.send("end")
        self._process.join(timeout=20)
        code = self._process.exitcode
        self._process.kill()
        self._process.join()
        self._process.close()
        self._pipe.close()
        assert code == 0
