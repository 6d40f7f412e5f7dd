"""Fits docs that are read in the repository to the site. A hook of mkdocs (`hooks` in mkdocs.yml).

A link that leaves docs/ becomes the name of the file, which the site does not have. One whose file does
not exist stays a link, so that a strict build refuses it.
"""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
GENERATED = ("features.md", "models.md")
"""Pages made from the markers of tests, which may not be there yet."""

_OUTWARD = re.compile(r"\[([^\]]+)\]\((\.\./[^)#]+)(#[^)]*)?\)")


def on_config(config: Any) -> Any:
    """Leave pages out of the navigation that have not been generated."""
    for section in config["nav"]:
        for name, entries in section.items():
            if isinstance(entries, list):
                section[name] = [entry for entry in entries if _is_there(entry)]
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Name files of the repository instead of linking to them."""
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def name(match: re.Match[str]) -> str:
        text, target, _ = match.groups()
        place = (folder / target).resolve()
        if not place.exists():
            return match[0]
        path = f"`{place.relative_to(ROOT)}`"
        return path if text.strip("`").rpartition("/")[2] == place.name else f"{text} ({path})"

    return _OUTWARD.sub(name, markdown)


def _is_there(entry: dict[str, str]) -> bool:
    (page,) = entry.values()
    return page not in GENERATED or (ROOT / "docs" / page).exists()
