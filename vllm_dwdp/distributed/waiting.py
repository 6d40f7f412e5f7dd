"""A wait for peers that says whom it waits for: to callers that ask, and to the log every 10 s."""

import time
from collections.abc import Iterable

from vllm_dwdp.logger import init_logger

logger = init_logger(__name__)

WAITING_NOTICE_S = 10.0


class Wait:
    """One wait, which begins when it is made.

    Args:
        who: the rank that waits, for the log.
        missing: the peers that it waits for.
        purpose: what they are to do.
        timeout_s: how long it waits at most.
    """

    def __init__(self, who: str, missing: Iterable[int], purpose: str, timeout_s: float) -> None:
        self.missing = frozenset(missing)
        self._who = who
        self._purpose = purpose
        self._timeout_s = timeout_s
        self._started = self._noticed = time.monotonic()

    def __str__(self) -> str:
        return (
            f"waits for ranks {sorted(self.missing)} to {self._purpose} "
            f"({time.monotonic() - self._started:.0f} s of {self._timeout_s:g} s)"
        )

    @property
    def left_s(self) -> float:
        """Seconds until its deadline; below 0 once that has passed."""
        return self._started + self._timeout_s - time.monotonic()

    def notice(self) -> None:
        """Log it, if it has not been logged for ten seconds; call often."""
        if time.monotonic() - self._noticed > WAITING_NOTICE_S:
            self._noticed = time.monotonic()
            logger.info("%s %s", self._who, self)
