"""Places where no rank can meet another, and are refused."""

import os
from pathlib import Path

import pytest

from tests.multiprocess.members import rank
from vllm_dwdp.distributed.meeting import parse_endpoint
from vllm_dwdp.errors import (
    DwdpConfigError,
    RendezvousError,
)

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.timeout(60),
    pytest.mark.usefixtures("nothing_leaks"),
]


def test_a_folder_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o755)
    with pytest.raises(RendezvousError, match=r"mode 0755; .* chmod 700"):
        rank(parse_endpoint(f"unix://{folder}"), 0)


def test_a_folder_of_another_user_is_refused_with_that_user(tmp_path: Path) -> None:
    """Root makes one; to anybody else the root folder is one."""
    folder, uid = (tmp_path / "theirs", 65534) if os.geteuid() == 0 else (Path("/"), 0)
    if uid:
        folder.mkdir(mode=0o700)
        os.chown(folder, uid, -1)
    with pytest.raises(RendezvousError, match=rf"\. Start this rank as uid {uid}, or choose"):
        rank(parse_endpoint(f"unix://{folder}"), 0)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RendezvousError, match="cannot be made"):
        rank(parse_endpoint(f"unix://{tmp_path}/file/meet"), 0)


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RendezvousError, match="short path"):
        rank(parse_endpoint(f"unix://{tmp_path}/{'x' * 120}"), 0)


@pytest.mark.parametrize("text", ["unix://relative", "/tmp/x", "abstract:", "http://x", ""])
def test_other_places_are_no_meeting_place(text: str) -> None:
    with pytest.raises(DwdpConfigError, match="is not a meeting place; use unix:///"):
        parse_endpoint(text)
