"""Decode servers that come back, and what becomes of them until they were compared."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.waiting import wait_until
from vllm_dwdp.entrypoints.launch import admission
from vllm_dwdp.entrypoints.launch.admission import (
    ADMISSION_FILE_ENV,
    ADMITTED,
    COMPARING,
    GONE,
    REFUSED,
    UNNAMED,
    Admission,
    Candidate,
    read_admission,
)
from vllm_dwdp.errors import DwdpConfigError

pytestmark = pytest.mark.timeout(60)
PLACE = "127.0.0.1:{}"


class Servers:
    """Decode servers that do as they are told, and what became of them."""

    def __init__(self, folder: Path, count: int) -> None:
        self.serving = ["first"] * count
        self.outcome: list[Callable[[], None]] = [lambda: None] * count
        self.has_rank = True
        self.file = folder / "decode.json"
        made = [self._candidate(index) for index in range(count)]
        self.admission = Admission(made, self.file)
        self.admission.admit_all()

    def _candidate(self, index: int) -> Candidate:
        return Candidate(
            name=f"decode {index}",
            place=PLACE.format(index),
            identity=lambda: self.serving[index],
            compare=lambda: self.outcome[index] if self.has_rank else None,
        )

    def states(self) -> list[str]:
        """As the relay reads them."""
        read = read_admission({ADMISSION_FILE_ENV: str(self.file)})
        return [read[PLACE.format(index)][0] for index in range(len(self.serving))]

    def news_once(self, state: str, index: int = 0) -> list[str]:
        """Poll until a server has this state."""
        news: list[str] = []

        def has_come() -> bool:
            news.extend(self.admission.poll())
            return self.states()[index] == state

        wait_until(has_come, timeout_s=10)
        return news

    def restart(self, index: int = 0, after: str = "second") -> None:
        self.serving[index] = ""
        self.admission.poll()
        assert self.states()[index] == GONE and not self.admission.is_complete
        self.serving[index] = after


def fails(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def test_one_that_comes_back_gets_nothing_until_it_was_compared(tmp_path: Path) -> None:
    servers = Servers(tmp_path, 1)
    assert servers.states() == [ADMITTED] and not servers.admission.poll()
    may_end = threading.Event()
    servers.outcome[0] = lambda: bool(may_end.wait(20)) and None
    servers.restart()
    assert servers.news_once(COMPARING) == []
    assert servers.admission.poll() == [] and servers.states() == [COMPARING]
    may_end.set()
    assert servers.news_once(ADMITTED) == ["decode 0: fits the ranks, and gets requests"]
    assert servers.admission.is_complete


def test_one_that_was_only_silent_is_not_compared_again(tmp_path: Path) -> None:
    servers = Servers(tmp_path, 1)
    servers.outcome[0] = fails(DwdpConfigError("compared"))
    servers.restart(after="first")
    assert servers.news_once(ADMITTED) == []


def test_who_cannot_be_told_from_another_is_compared(tmp_path: Path) -> None:
    servers = Servers(tmp_path, 1)
    servers.serving[0] = UNNAMED
    servers.admission.admit_all()
    servers.restart(after=UNNAMED)
    assert servers.news_once(ADMITTED) == ["decode 0: fits the ranks, and gets requests"]


def test_one_that_goes_while_it_is_compared_is_compared_anew(tmp_path: Path) -> None:
    servers = Servers(tmp_path, 1)
    may_end = threading.Event()
    servers.outcome[0] = lambda: bool(may_end.wait(20)) and None
    servers.restart()
    servers.news_once(COMPARING)
    servers.outcome[0] = fails(DwdpConfigError("another model"))
    servers.restart()
    may_end.set()
    assert servers.news_once(REFUSED) == ["decode 0: gets no requests: another model"]


def test_no_rank_is_there_to_compare_it_with(tmp_path: Path) -> None:
    servers = Servers(tmp_path, 1)
    servers.has_rank = False
    servers.restart()
    assert servers.admission.poll() == [] and servers.states() == [GONE]
    servers.has_rank = True
    servers.news_once(ADMITTED)


def test_what_only_happened_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "AGAIN_S", 0.0)
    servers = Servers(tmp_path, 2)
    servers.outcome[0] = fails(DwdpConfigError("rank 0 does not answer"))
    servers.restart()
    assert servers.news_once(REFUSED) == ["decode 0: gets no requests: rank 0 does not answer"]
    servers.outcome[0] = lambda: None
    assert servers.news_once(ADMITTED) == ["decode 0: fits the ranks, and gets requests"]


def test_one_whose_comparison_broke_gets_nothing(tmp_path: Path) -> None:
    """Whatever it broke of: only what was compared to its end is admitted."""
    servers = Servers(tmp_path, 1)
    servers.outcome[0] = fails(KeyError("data"))
    servers.restart()
    (line,) = servers.news_once(REFUSED)
    assert line == "decode 0: gets no requests: comparing it failed: KeyError: 'data'"


def test_nobody_says_anything(tmp_path: Path) -> None:
    assert read_admission({}) == {}
    assert read_admission({ADMISSION_FILE_ENV: str(tmp_path / "none")}) == {}
