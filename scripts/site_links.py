"""Fits docs that are read in the repository to the site. A hook of mkdocs (`hooks` in mkdocs.yml).

A link that leaves docs/ becomes the name of the file, which the site does not have. One whose file does
not exist stays a link, so that a strict build refuses it. Two files of the root are pages too. Names of
code may break after a slash or an underscore, so that a table fits a phone.
"""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
GENERATED = ("features.md", "models.md")
"""Pages made from the markers of tests, which may not be there yet."""

ROOT_PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
"""Pages of the site by what the repository's root calls them."""

_DOWNWARD = re.compile(r"\]\((?:docs/([^)]+)|(CHANGELOG|CONTRIBUTING)(\.md))\)")
_INLINE_CODE = re.compile(r"(?<!<pre>)<code>([^<]*)</code>")
_BREAK = re.compile(r"([/_])(?=[^/_])")
_OUTWARD = re.compile(r"\[([^\]]+)\]\((\.\./[^)#]+)(#[^)]*)?\)")


def on_config(config: Any) -> Any:
    """Leave pages out of the navigation that have not been generated."""
    for section in config["nav"]:
        for name, entries in section.items():
            if isinstance(entries, list):
                section[name] = [entry for entry in entries if _is_there(entry)]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Make pages of what GitHub shows at the repository's root."""
    from mkdocs.structure.files import File

    for page, name in ROOT_PAGES.items():
        text = _DOWNWARD.sub(_inside, (ROOT / name).read_text())
        files.append(File.generated(config, page, content=text))
    return files


def _inside(match: re.Match[str]) -> str:
    in_docs, name, ending = match.groups()
    return f"]({in_docs or name.lower() + ending})"


def on_page_content(html: str, **_: Any) -> str:
    """Let inline code break after a slash or an underscore."""

    def breakable(match: re.Match[str]) -> str:
        return "<code>" + _BREAK.sub(r"\1<wbr>", match[1]) + "</code>"

    return _INLINE_CODE.sub(breakable, html)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Name files of the repository instead of linking to them."""
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def name(match: re.Match[str]) -> str:
        text, target, _ = match.groups()
        place = (folder / target).resolve()
        if not place.exists():
            return match[0]
        if place.name in ROOT_PAGES.values():
            return f"[{text}]({place.name.lower()})"
        path = f"`{place.relative_to(ROOT)}`"
        return path if text.strip("`").rpartition("/")[2] == place.name else f"{text} ({path})"

    return _OUTWARD.sub(name, markdown)


def _is_there(entry: dict[str, str]) -> bool:
    (page,) = entry.values()
    return page not in GENERATED or (ROOT / "docs" / page).exists()
