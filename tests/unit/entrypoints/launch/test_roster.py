"""The list of servers that a launch keeps where its ranks meet."""

import os
from pathlib import Path

from vllm_dwdp.entrypoints.launch import roster
from vllm_dwdp.entrypoints.launch.roster import Entry


def test_the_roster_is_that_of_a_living_launch(tmp_path: Path) -> None:
    meeting = f"unix://{tmp_path}"
    entry = Entry(role="decode", index=0, url="http://h:1", pid=None, state="serving")
    assert roster.read_roster(meeting) == []
    with roster.roster(meeting) as written:
        written.write([entry])
        assert roster.read_roster(meeting) == [entry]
        file = tmp_path / roster.NAME
        file.write_text(file.read_text().replace(f'"pid": {os.getpid()}', '"pid": 0'))
        assert roster.read_roster(meeting) == [], "of a launch that was killed"
    assert not list(tmp_path.iterdir())
    with roster.roster("tcp://h:1") as written:
        written.write([entry])
    assert roster.read_roster("tcp://h:1") == []
