"""The mechanical half of how our documents read; the rest needs a reader."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")])
LONG_WORDS = 30
LONG_SHARE = 0.05
# Words of ours that a reader of another project could not look up.
PRIVATE = re.compile(
    r"\b(hopeless|lonely|crowd(ed|s)?|bur(y|ies)|heals?|earlier li(fe|ves)|hung up)\b"
    r"|\.\./shared|/work/",
    re.I,
)
# Words that a sentence loses nothing without, or that praise in place of a figure.
FILLER = re.compile(
    r"\b(simply|just|easily|obviously|of course|basically|note that|in order to|quite|"
    r"seamless\w*|leverag\w+|utili[sz]e\w*|blazing\w*|powerful|robust\w*|cutting-edge)\b",
    re.I,
)
# Pronouns for which there is a noun: the user, client, process, rank or thread that is meant.
PERSON = re.compile(
    r"\b(nobody|whoever|somebody|someone|anybody|anyone|everybody|everyone)\b",
    re.I,
)
TWICE = re.compile(r"\b(?!Code\b)(\w+) \1\b")
CODE = [
    path
    for folder in ("vllm_dwdp", "gpu_checks", "benchmarks", "examples", "scripts", "csrc")
    for path in sorted((REPOSITORY / folder).rglob("*"))
    if path.suffix in (".py", ".cpp", ".h", ".sh") and "build" not in path.parts
]

LIST_ITEM = re.compile(r"([-*]|\d+\.)\s+")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9\[`*(\"])")


def blocks(text: str) -> list[str]:
    """Split Markdown into paragraphs, list items and table cells, without code and headings."""
    text = re.sub(r"^( *)(```|~~~).*?^\1\2", "\n", text, flags=re.S | re.M)
    found: list[str] = [""]
    for line in map(str.strip, text.splitlines()):
        if line.startswith("|"):
            cells = line.strip("|").replace(r"\|", "/").split("|")
            found += [cell for cell in cells if cell.strip(" :-")] + [""]
        elif not line or line.startswith(("#", "![", "<")):
            found.append("")
        elif item := LIST_ITEM.match(line):
            found.append(line[item.end() :])
        else:
            found[-1] += f" {line}"
    return [block.strip() for block in found if block.strip()]


def sentences(text: str) -> list[str]:
    """Split Markdown into sentences; a span of code, and what a link leads to, is one word."""
    found = []
    for block in blocks(text):
        plain = re.sub(r"`[^`]*`", "Code", re.sub(r"\]\([^)]*\)", "]", block))
        found += [sentence for sentence in SENTENCE_END.split(plain) if sentence.strip()]
    return found


def is_long(sentence: str) -> bool:
    return len(re.findall(r"[\w'/.-]+", sentence)) > LONG_WORDS


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_few_sentences_are_long(document: Path) -> None:
    found = sentences(document.read_text())
    too_long = [sentence for sentence in found if is_long(sentence)]
    assert len(too_long) <= max(1, LONG_SHARE * len(found)), "\n".join(too_long)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_no_private_words(document: Path) -> None:
    assert PRIVATE.findall(document.read_text()) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_word_says_something(document: Path) -> None:
    found = sentences(document.read_text())
    assert [each for each in found if FILLER.search(each) or TWICE.search(each)] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_who_acts_is_named(document: Path) -> None:
    """In a document, except in code, which may be a message of others."""
    found = sentences(document.read_text())
    assert [each for each in found if PERSON.search(each)] == []


def test_who_acts_is_named_in_docstrings_comments_and_messages() -> None:
    found = {(path.name, match[0]) for path in CODE for match in PERSON.finditer(path.read_text())}
    assert found == set()


def test_what_says_nothing() -> None:
    assert [FILLER.search(text) is not None for text in ("It just works", "justified")] == [
        True,
        False,
    ]
    assert PRIVATE.search("as ../shared says") and PRIVATE.search("in /work/main")
    assert TWICE.search("all of of it") and not TWICE.search("Code Code of often")


def test_no_private_words_in_messages_comments_and_names() -> None:
    """In a name an underscore ends a word."""
    assert len(CODE) > 200
    found = {
        (path.name, match[0])
        for path in CODE
        for match in PRIVATE.finditer(path.read_text().replace("_", " "))
    }
    assert found == set()


def test_nothing_is_left_to_do_without_a_name() -> None:
    left = re.compile(r"\b(TODO|FIXME|XXX)\b")
    assert [path.name for path in CODE if left.search(path.read_text())] == []


def test_what_counts_as_a_sentence() -> None:
    text = "# A heading of its own\n\nOne. Two `a. b` [c](d. e)\nthree.\n\n- Four\n- Five. 6\n\n"
    text += "| a | b |\n|---|---|\n"
    assert sentences(text) == ["One.", "Two Code [c] three.", "Four", "Five.", "6", "a", "b"]
    assert is_long("word " * 31) and not is_long("word " * 30)
