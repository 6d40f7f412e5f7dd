"""What the documents tell a reader to type, by page and in order.

A fence of commands is marked `sh`, a program `python`; everything else says that it is `text`, `json`
and so on. A comment that begins with `needs` or `takes` says why no test runs the command.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
TYPED = ("sh", "python")
SHOWN = ("text", "json", "yaml")

_FENCE = re.compile(r"^( *)```(.*?)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
_MARK = re.compile(r"# ((?:needs|takes) .*)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Fence:
    """A block of a page: its language, the number of its first line, and its text."""

    page: str
    line: int
    language: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Step:
    """A command or a program; `mark` is what its comment says that it needs, or empty."""

    page: str
    line: int
    language: str
    text: str
    mark: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def words(self) -> list[str]:
        """Of a command, without its comment."""
        if self.language != "sh":
            return []
        return shlex.split(self.text.replace("\\\n", " "), comments=True)

    @property
    def is_server(self) -> bool:
        """Whether it goes on until it is interrupted."""
        return any(pair in self.text for pair in ("vllm serve ", "vllm-dwdp launch "))

    @property
    def asks_a_server(self) -> bool:
        """Whether it needs one that an earlier step has started."""
        return self.words[:1] == ["curl"] or "unix:///" in self.text


def fences(page: Path, text: str | None = None) -> list[Fence]:
    """Return the blocks of a page, or of this text of one, in order."""
    text = page.read_text() if text is None else text
    name = page.relative_to(ROOT).as_posix()
    return [
        Fence(
            page=name,
            line=text.count("\n", 0, match.start(3)) + 1,
            language=match[2].strip(),
            text=re.sub(f"^{match[1]}", "", match[3], flags=re.MULTILINE),
        )
        for match in _FENCE.finditer(text)
    ]


def steps(page: Path, text: str | None = None) -> list[Step]:
    """Return what a reader of the page types, in order."""
    return [
        step for fence in fences(page, text) if fence.language in TYPED for step in _split(fence)
    ]


def _split(fence: Fence) -> Iterator[Step]:
    if fence.language == "python":
        yield _step(fence, fence.line, fence.text)
        return
    number, begun = fence.line, ""
    for offset, line in enumerate(fence.text.splitlines()):
        if not begun:
            number = fence.line + offset
        begun += f"{line}\n"
        # A command ends where the shell says so: not within quotes, nor after a backslash.
        if _is_whole(begun):
            if begun.strip():
                yield _step(fence, number, begun.strip())
            begun = ""
    assert not begun, f"{fence.page}:{number}: the command does not end"


def _is_whole(text: str) -> bool:
    try:
        shlex.split(text, comments=True)
    except ValueError:
        return False
    return not text.endswith("\\\n")


def _step(fence: Fence, line: int, text: str) -> Step:
    mark = _MARK.search(text)
    return Step(
        page=fence.page,
        line=line,
        language=fence.language,
        text=text,
        mark=mark[1] if mark else "",
    )
