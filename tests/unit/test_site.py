"""The documentation site is whole, and its reference pages say what the source says."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from tests.helpers.documented import PAGES, ROOT, SHOWN, TYPED, fences, steps
from vllm_dwdp.compat.frontend import metrics
from vllm_dwdp.config import DwdpConfig

DOCS = ROOT / "docs"
COMMAND = re.compile(r"^\s*(vllm|vllm-dwdp|python3?|pip|make|curl|docker|kubectl) ", re.MULTILINE)


def rows_of(page: str) -> dict[str, list[str]]:
    """Table rows of a page by the code in their first cell."""
    rows = {}
    for line in (DOCS / page).read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and (found := re.fullmatch("`([^`]+)`", cells[0])):
            rows[found[1]] = cells[1:]
    return rows


def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="mkdocs-material: the extra `dev` has it")
    ended = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "index.html").exists()
    assert "<svg" in (tmp_path / "pictures" / "ring.svg").read_text()
    contributing = (tmp_path / "contributing" / "index.html").read_text()
    assert 'href="../design/"' in contributing and 'href="../changelog/"' in contributing
    assert 'href="../contributing/"' in (tmp_path / "changelog" / "index.html").read_text()
    gpu = (tmp_path / "gpu" / "index.html").read_text()
    assert "<code>tests/<wbr>cuda/<wbr>test_<wbr>driver.py</code>" in gpu, (
        "a name that cannot break"
    )


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"(\S+\.md)", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2])
    assert {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} <= set(listed)


def test_files_outside_of_the_docs_exist() -> None:
    """On the site they are names; in the repository they are links."""
    targets = [
        (page, target)
        for page in DOCS.rglob("*.md")
        for target in re.findall(r"\]\((\.\./[^)#\s]+)", page.read_text())
    ]
    assert targets
    assert [str(each) for each in targets if not (each[0].parent / each[1]).exists()] == []


def test_every_option_is_described_with_its_default() -> None:
    rows = rows_of("configuration.md")
    assert set(rows) == {field.name for field in fields(DwdpConfig)}
    defaults = DwdpConfig(group_size=2)
    assert rows["mode"][0].strip("`") == f'"{defaults.mode}"'
    assert float(rows["join_timeout_s"][0]) == defaults.join_timeout_s
    assert rows["rendezvous_secret_file"][0] == "none"
    for name in ("experts_per_rank", "direct_max_tokens", "slice_bytes", "executor", "rendezvous"):
        assert getattr(defaults, name) is None, f"{name} has a default of its own now"


def test_every_metric_is_described_with_its_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = CollectorRegistry()
    for kind in ("Gauge", "Counter"):
        monkeypatch.setattr(metrics, kind, registered_in(registry, getattr(metrics, kind)))
    metrics.RankMetrics("m")
    made = {}
    for metric in registry._collector_to_names:
        (family,) = metric.describe()
        total = "_total" if family.type == "counter" else ""
        made[family.name + total] = [
            label for label in metric._labelnames if label not in ("model_name", "engine")
        ]
    described = {name: re.findall("`(.*?)`", row[0]) for name, row in rows_of("metrics.md").items()}
    assert described == made


def registered_in(registry: CollectorRegistry, kind: type) -> object:
    return lambda *arguments, **options: kind(*arguments, **options, registry=registry)


def text_of_the_source() -> str:
    """All string literals of the package, pieces of f-strings with `...` between them, in order."""
    texts = []
    for path in (ROOT / "vllm_dwdp").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                pieces = [
                    str(piece.value) if isinstance(piece, ast.Constant) else "..."
                    for piece in node.values
                ]
                texts.append("".join(pieces))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(re.sub(r"%[\w.]*[sdf]", "...", node.value))
    return "\n".join(texts)


def test_every_message_is_one_that_the_source_has() -> None:
    messages = list(rows_of("troubleshooting.md"))
    assert len(messages) > 15
    source = text_of_the_source()
    assert [message for message in messages if message not in source] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_block_says_whether_a_reader_types_it(page: Path) -> None:
    """What is typed is run by `tests/e2e/test_documented_commands.py`, or says what it needs."""
    assert page.read_text().count("```") == 2 * len(fences(page))
    assert [each for each in fences(page) if each.language not in (*TYPED, *SHOWN)] == []
    for fence in fences(page):
        assert fence.language != "text" or not COMMAND.search(fence.text), fence


def test_commands_are_told_from_what_they_need(tmp_path: Path) -> None:
    page = ROOT / "page.md"
    text = "```sh\na 'b\nc' \\\n    d    # needs a GPU\n\ne # it takes # takes days\n```\n"
    text += "1.\n   ```python\n   f()\n   ```\n```text\nvllm\n```\n"
    found = [(step.line, step.words, step.text, step.mark) for step in steps(page, text)]
    assert found == [
        (2, ["a", "b\nc", "d"], "a 'b\nc' \\\n    d    # needs a GPU", "needs a GPU"),
        (6, ["e"], "e # it takes # takes days", "takes days"),
        (10, [], "f()\n", ""),
    ]


def test_commands_of_the_pages_exist() -> None:
    """Also those within sentences, which nothing runs."""
    from vllm_dwdp.entrypoints.cli.main import app

    commands = {each.name or each.callback.__name__ for each in app.registered_commands}
    targets = set(re.findall(r"^([a-z0-9- ]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    known = {
        r"vllm-dwdp ([a-z]+)": commands,
        r"make ([a-z0-9-]+)": {name for line in targets for name in line.split()},
    }
    for page in PAGES:
        typed = "\n".join(re.findall(r"`([^`\n]+)`", page.read_text()))
        typed += "".join(f"\n{step.text}" for step in steps(page))
        for pattern, names in known.items():
            named = {*re.findall(rf"^(?:\.venv/bin/)?{pattern}", typed, re.MULTILINE)}
            assert named <= names, page.name
        for module in re.findall(r"python3? -m ([\w.]+)", typed):
            assert importlib.util.find_spec(module), f"{page.name}: {module}"
        for file in re.findall(r"(?:python3? |pytest (?:-rP )?)([\w/]+\.py)", typed):
            assert (ROOT / file).exists(), f"{page.name}: {file}"


def test_the_guide_names_tests_that_exist() -> None:
    root = Path(__file__).parents[2]
    guides = [root / "docs" / name for name in ("operations.md", "disaggregation.md")]
    named = set(re.findall(r"`(test_\w+)`", "".join(guide.read_text() for guide in guides)))
    assert len(named) > 10
    assert named <= {path.stem for path in (root / "tests").rglob("test_*.py")}
