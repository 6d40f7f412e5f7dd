"""Points of a start that the ranks of one GPU reach one after the other."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TURNS_ENV = "DWDP_TEST_TURNS"
"""Names the folder in which ranks meet, for engine processes that shall take turns."""
TURN_S = 200


class Turns:
    """Points that every rank reaches, in the same order in each."""

    def __init__(self, folder: Path, rank: int, num_ranks: int = 2) -> None:
        self.folder, self.rank, self.num_ranks = folder, rank, num_ranks
        self._number = 0

    def together(self) -> None:
        """Wait until every rank is here."""
        self._number += 1
        (self.folder / f"turn{self._number}-{self.rank}").touch()
        deadline = time.monotonic() + TURN_S
        for rank in range(self.num_ranks):
            while not (self.folder / f"turn{self._number}-{rank}").exists():
                assert time.monotonic() < deadline, f"rank {rank} did not come in {TURN_S} s"
                time.sleep(0.01)

    def one_by_one(self, action: Callable[[], Any]) -> Any:
        """Let each rank act while the others wait."""
        result = None
        for rank in range(self.num_ranks):
            self.together()
            if rank == self.rank:
                result = action()
        self.together()
        return result


_turns: Turns | None = None


def turns_of_process() -> Turns:
    """Return what `take_turns` made in this process."""
    assert _turns is not None, f"{TURNS_ENV} is not set"
    return _turns


def take_turns(folder: Path, rank: int) -> None:
    """Let GPU workers of this process begin, and size their caches, in turn from now on."""
    from vllm_dwdp.executor.gpu_worker import DwdpGPUWorker

    global _turns
    turns = _turns = Turns(folder, rank)
    for name in ("init_device", "determine_available_memory"):
        stock = getattr(DwdpGPUWorker, name)

        @functools.wraps(stock)
        def in_turn(self: Any, stock: Callable[[Any], Any] = stock) -> Any:
            return turns.one_by_one(lambda: stock(self))

        setattr(DwdpGPUWorker, name, in_turn)
