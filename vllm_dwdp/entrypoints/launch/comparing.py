"""Compares decode servers with the ranks where no launch does it: one container for each server.

Runs in a thread of the relay. What it finds out is said where doors and relay look (`admission`), and on
standard output.
"""

import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from vllm_dwdp.entrypoints.launch.admission import (
    ADMISSION_FILE_ENV,
    UNNAMED,
    Admission,
    Candidate,
)
from vllm_dwdp.entrypoints.launch.door import DoorServer
from vllm_dwdp.entrypoints.launch.hop import HEALTH_TIMEOUT_S, ask
from vllm_dwdp.entrypoints.launch.pairing import Server, check_pairs
from vllm_dwdp.entrypoints.launch.server import READY_PATH

POLL_INTERVAL_S = 0.5


def begin_comparing(
    doors: Sequence[DoorServer], rank_urls: Sequence[str], report: Callable[[str], None]
) -> None:
    """Close the doors, and open each in the background once its server fits every rank that serves.

    Args:
        doors: of the decode servers.
        rank_urls: of all ranks.
        report: called with a line of news.
    """
    file = Path(tempfile.mkdtemp(prefix="vllm-dwdp-")) / "decode.json"
    os.environ[ADMISSION_FILE_ENV] = str(file)
    candidates = [_candidate(f"decode {n}", door, rank_urls) for n, door in enumerate(doors)]
    admission = Admission(candidates, file)
    admission.poll()  # before any request
    threading.Thread(target=_compare_forever, args=(admission, report), daemon=True).start()


def _compare_forever(admission: Admission, report: Callable[[str], None]) -> None:
    while True:
        for line in admission.poll():
            report(line)
        time.sleep(POLL_INTERVAL_S)


def _candidate(name: str, door: DoorServer, rank_urls: Sequence[str]) -> Candidate:
    return Candidate(
        name=name,
        place=door.place,
        identity=lambda: UNNAMED if _serves(door.url) else "",
        compare=lambda: _comparison(Server(name, door.url), rank_urls),
    )


def _comparison(decode: Server, rank_urls: Sequence[str]) -> Callable[[], None] | None:
    """Return what compares a decode server with every rank that serves now; None if none does."""
    ranks = [Server(f"rank {rank}", url) for rank, url in enumerate(rank_urls) if _serves(url)]
    return partial(check_pairs, ranks, decode) if ranks else None


def _serves(url: str) -> bool:
    answer = ask(url, "GET", READY_PATH, b"", {}, HEALTH_TIMEOUT_S)
    return answer is not None and answer.status == 200
