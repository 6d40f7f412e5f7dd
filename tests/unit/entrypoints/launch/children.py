"""Children of launch that a test makes and polls itself."""

import time
from collections.abc import Callable
from pathlib import Path

from vllm_dwdp.entrypoints.launch.child import Child


def made_child(log: Path, *command: str, doing: str = "loads", ready: bool = False) -> Child:
    return Child("rank 0", lambda: list(command), log, lambda: ready, lambda: doing)


def poll_until(kept: Child, state: str) -> None:
    poll_while(kept, lambda: not kept.state.startswith(state))


def poll_while(kept: Child, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while condition():
        assert time.monotonic() < deadline, (kept.state, kept.doing)
        kept.poll()
        time.sleep(0.005)
