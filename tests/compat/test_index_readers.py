"""Everything in vLLM that reads where a rank stands has been looked at; see docs/compat.md.

A reader that comes or goes with a new version of vLLM fails here, by name: look what it derives, whether
that is right for ranks that do not know of each other, and move its line.
"""

import re
from pathlib import Path

import pytest

from tests.compat.index_readers import looked_at, readers, readers_of
from tests.compat.versions import vllm_minor

pytestmark = pytest.mark.compat

ROOT = Path(__file__).parents[2]


def list_of_this_version() -> Path:
    return Path(__file__).with_name("index_readers_{}.{}.txt".format(*vllm_minor()))


def test_every_reader_of_a_ranks_place_has_been_looked_at() -> None:
    import vllm

    found = set(readers_of(Path(vllm.__file__).parent))
    known = set(looked_at(list_of_this_version()))
    assert not found - known, "new readers; look at them"
    assert not known - found, "readers that have gone"


def test_every_row_of_readers_is_in_the_documentation() -> None:
    text = (ROOT / "docs" / "compat.md").read_text()
    section = text.split("## Whose index it is")[1].split("\n## ")[0]
    documented = set(re.findall(r"^\| \*\*(.+?)\*\*", section, re.MULTILINE))
    assert set(looked_at(list_of_this_version()).values()) == documented


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("def f(c): return c.data_parallel_index", {"f": {"data_parallel_index"}}),
        (
            "class A:\n async def f(s):\n  s.p.data_parallel_rank += 1",
            {"A.f": {"data_parallel_rank"}},
        ),
        ("def f(c): return getattr(c, 'data_parallel_size', 1)", {"f": {"data_parallel_size"}}),
        ("x = config.local_engines_only", {"-": {"local_engines_only"}}),
        ("def f(data_parallel_rank=0): 'the data_parallel_rank'  # data_parallel_index", {}),
    ],
)
def test_a_reader_is_seen(text: str, found: dict[str, set[str]]) -> None:
    assert readers(text) == found
