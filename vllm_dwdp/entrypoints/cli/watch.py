"""`vllm-dwdp status --watch`: how the ranks are, again and again, with what they do in a second.

On a terminal one table that changes; anywhere else one line a rank and look, for pipes and logs.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rich.live import Live

from vllm_dwdp.distributed.endpoint import name_of
from vllm_dwdp.entrypoints.tables import console, say, table

Entry = Mapping[str, Any]
"""A rank's status, as `find_ranks` returns it."""

HEADINGS = ("rank", "state", "mode", "forwards/s", "copied/s", "late", "experts", "peers")


@dataclass(frozen=True, kw_only=True)
class Look:
    """What all ranks said at one moment.

    Args:
        entries: by group and rank.
        at_s: of the clock that `time.monotonic` reads.
    """

    entries: Mapping[tuple[int, int], Entry]
    at_s: float


def look_at(ranks: Iterable[Entry]) -> Look:
    """Keep what they say with the time."""
    entries = {(entry["group"], entry["dwdp_rank"]): entry for entry in ranks}
    return Look(entries=entries, at_s=time.monotonic())


def watch(find: Callable[[], list[dict[str, Any]]], title: str, interval_s: float) -> None:
    """Show the ranks until the user interrupts.

    Args:
        find: asks them.
        title: of the table.
        interval_s: between two looks.
    """
    before = None
    with suppress(KeyboardInterrupt):
        if console.is_terminal and not console.is_dumb_terminal:
            with Live(console=console, auto_refresh=False) as live:
                while True:
                    now = look_at(find())
                    shown = table(f"{title}, {_clock()}", HEADINGS, rows(before, now))
                    live.update(shown, refresh=True)
                    before = now
                    time.sleep(interval_s)
        while True:
            now = look_at(find())
            say(*lines(before, now))
            before = now
            time.sleep(interval_s)


def lines(before: Look | None, now: Look) -> list[str]:
    """One line for each rank, with the time in front."""
    described = []
    for name, *cells in rows(before, now):
        facts = zip(HEADINGS[1:], cells, strict=True)
        described.append(
            ", ".join([name, *(f"{heading} {cell}" for heading, cell in facts if cell)])
        )
    return [f"{_clock()}  {line}" for line in described or ["no rank is there"]]


def rows(before: Look | None, now: Look) -> list[list[str]]:
    """Return a row for each rank, in the order of `HEADINGS`.

    Args:
        before: the look before this one; without it nothing is known per second.
        now: what to show.
    """
    return [_row(_seconds(before, now, key), before, entry) for key, entry in now.entries.items()]


def _seconds(before: Look | None, now: Look, key: tuple[int, int]) -> float | None:
    """Seconds since the same start of that rank was looked at; None if it was not."""
    if before is None or key not in before.entries:
        return None
    starts = [look.entries[key].get("generation") for look in (before, now)]
    return now.at_s - before.at_s if starts[0] == starts[1] is not None else None


def _row(seconds: float | None, before: Look | None, entry: Entry) -> list[str]:
    key = (entry["group"], entry["dwdp_rank"])
    earlier = before.entries[key] if before is not None and seconds is not None else None

    def rate(count: Callable[[Entry], float]) -> float | None:
        return None if earlier is None or not seconds else (count(entry) - count(earlier)) / seconds

    forwards, copied = rate(lambda each: each.get("forwards", 0)), rate(_copied)
    return [
        f"{name_of(key[1])} of group {key[0]}",
        str(entry["state"]),
        str(entry.get("mode", "")),
        "" if forwards is None else f"{forwards:.1f}",
        "" if copied is None else f"{copied / 1e6:.1f} MB",
        str(entry.get("late_prefetches", "")),
        _experts(entry),
        " ".join(f"{peer}:{state}" for peer, state in entry.get("peers", {}).items()),
    ]


def _copied(entry: Entry) -> float:
    return float(sum(entry.get("fetched_bytes", {}).values()))


def _experts(entry: Entry) -> str:
    """Where its experts come from."""
    if "held_ranks" in entry:
        return f"keeps those of ranks {entry['held_ranks']}"
    if "adopted" not in entry:
        return ""
    update = entry.get("weight_update", 0)
    origin = f"adopted in {entry['rejoin_seconds']:.1f} s" if entry["adopted"] else "loaded"
    return f"{origin}, update {update}" if update else origin


def _clock() -> str:
    return time.strftime("%H:%M:%S")
