"""Which servers a launch consists of, left where its ranks meet for `vllm-dwdp status`.

Stock decode servers have no socket there, and may run elsewhere. The file names the process that wrote
it; it goes when that launch ends.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

NAME = "servers.json"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One server.

    Args:
        role: prefill, decode or router.
        index: among those of its role.
        url: at which the launch reaches it.
        pid: None while it has no process, or where it runs elsewhere.
        state: as the launch saw it last.
    """

    role: str
    index: int
    url: str
    pid: int | None
    state: str


class Roster:
    """The file of one launch; does nothing where ranks meet in no folder.

    Args:
        rendezvous: where the ranks meet.
    """

    def __init__(self, rendezvous: str) -> None:
        self._file = roster_file(rendezvous)
        self._written: list[Entry] = []

    def write(self, entries: Sequence[Entry]) -> None:
        """Replace the file, if anything has changed: a reader sees one whole version."""
        if self._file is None or entries == self._written or not self._file.parent.is_dir():
            return
        new = self._file.with_suffix(".new")
        with contextlib.suppress(OSError):
            new.write_text(json.dumps({"pid": os.getpid(), "servers": [*map(asdict, entries)]}))
            new.rename(self._file)
            self._written = [*entries]

    def remove(self) -> None:
        """Remove what we have written."""
        if self._file is not None and self._written:
            with contextlib.suppress(OSError):
                self._file.unlink()


def roster_file(rendezvous: str) -> Path | None:
    """Return the file of the launch whose ranks meet there; None where no folder is."""
    is_folder = rendezvous.startswith("unix:///")
    return Path(rendezvous.removeprefix("unix://"), NAME) if is_folder else None


@contextlib.contextmanager
def roster(rendezvous: str) -> Iterator[Roster]:
    """Yield a roster that is gone afterwards."""
    made = Roster(rendezvous)
    try:
        yield made
    finally:
        made.remove()


def read_roster(rendezvous: str) -> list[Entry]:
    """Return the servers of the launch whose ranks meet there; none if no launch with decode servers is.

    What a launch left that was killed is not shown: its servers have ended with it.
    """
    file = roster_file(rendezvous)
    if file is None:
        return []
    try:
        found = json.loads(file.read_text())
        alive = Path(f"/proc/{found['pid']}").exists()
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [Entry(**each) for each in found["servers"]] if alive else []
