"""What a rank's start took: seconds by phase, and bytes that were digested. Main thread only."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from vllm_dwdp.device.base import PeerMemory, Shard

Phase = Literal["load", "meet", "digest", "map", "measure"]
PHASES: tuple[Phase, ...] = ("load", "meet", "digest", "map", "measure")
"""vLLM's loading and processing; waiting for peers and completing edges; digests, our own and those that
are compared; composite tensors and layers over them; the speeds of copies and of reads in place."""


class StartCost:
    """Adds up while a rank joins its group.

    A phase within another one stops the other's clock, so no second counts twice.
    """

    def __init__(self) -> None:
        self.seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self.digested_bytes = 0
        self._running: Phase | None = None
        self._since = 0.0

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """While active, time counts as this phase's."""
        outer = self._switch_to(name)
        try:
            yield
        finally:
            self._switch_to(outer)

    def digest_of(self, memory: Shard | PeerMemory, num_bytes: int) -> bytes:
        """Return the digest of memory of `num_bytes`."""
        with self.phase("digest"):
            self.digested_bytes += num_bytes
            return memory.digest()

    def _switch_to(self, name: Phase | None) -> Phase | None:
        now, before = time.monotonic(), self._running
        if before is not None:
            self.seconds[before] += now - self._since
        self._running, self._since = name, now
        return before
