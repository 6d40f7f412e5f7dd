"""`launch` as one more holder of the experts: when all ranks die at once, they come back to them.

A thread of `launch` asks the ranks twice a second and keeps what they publish; a thread per group
answers. Neither touches torch, vLLM or a device, and nothing of the launch waits for them.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.device.limits import check_open_files
from vllm_dwdp.distributed.holder import GroupHolder
from vllm_dwdp.distributed.meeting import parse_endpoint
from vllm_dwdp.logger import format_gib

LOOK_INTERVAL_S = 0.5


class ExpertHolder:
    """Holds the experts of every group of a launch, until its context is left.

    Args:
        groups: one holder each; empty where nothing can or shall be held.
    """

    def __init__(self, groups: Sequence[GroupHolder]) -> None:
        self._groups = groups
        self._news: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._said: dict[int, str] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dwdp-holder", daemon=True)

    @contextmanager
    def holding(self) -> Iterator[None]:
        """While active, look after the groups."""
        if not self._groups:
            yield
            return
        self._thread.start()
        try:
            yield
        finally:
            self._end.set()
            self._thread.join()

    def news(self) -> list[str]:
        """Take the lines that are to be told."""
        lines = []
        while not self._news.empty():
            lines.append(self._news.get())
        return lines

    def _run(self) -> None:
        while not self._end.wait(LOOK_INTERVAL_S):
            for group in self._groups:
                for line in group.look():
                    self._news.put(line)
                self._tell_what_is_held(group)

    def _tell_what_is_held(self, group: GroupHolder) -> None:
        status = group.status()
        ranks, num_bytes = status["held_ranks"], status["held_bytes"]
        kept = f"keeps {format_gib(num_bytes)} of experts, of ranks {ranks}"
        line = f"holder of group {group.group}: {kept}"
        if ranks and self._said.get(group.group) != line:
            self._said[group.group] = line
            self._news.put(line)


@contextmanager
def expert_holder(
    config: DwdpConfig, num_groups: int, report: Callable[[str], None]
) -> Iterator[ExpertHolder]:
    """Hold the experts of the first `num_groups` groups of a launch while active.

    Raises:
        RendezvousError: another launch holds them already, or the meeting place cannot be used.
    """
    with ExitStack() as opened:
        groups = []
        if num_groups and config.shares_experts and config.rendezvous is not None:
            size = config.group_size
            place = parse_endpoint(config.rendezvous, size, config.rendezvous_secret_file)
            if not place.holders:
                report(
                    f"no holder: the CUDA fabric handles that travel at {place} keep nothing alive"
                )
            for group in range(num_groups) if place.holders else ():
                groups.append(GroupHolder.open(place, group, size, check_open_files))
                opened.callback(groups[-1].close)
        holder = ExpertHolder(groups)
        opened.enter_context(holder.holding())
        yield holder
