"""Open files of this process, for tests of what is left behind."""

import gc
import os
import time

SETTLED = 3
"""So many counts in a row must agree."""


def num_open_files() -> int:
    """Count them once garbage is collected and threads that hang up a moment later have done so."""
    gc.collect()
    counts = list(range(SETTLED))
    while len(set(counts[-SETTLED:])) > 1:
        time.sleep(0.02)
        counts.append(len(os.listdir("/proc/self/fd")))
    return counts[-1]
