"""The published figures beside the model's: how many are reached, and that none is fitted silently."""

import json
import math
import re
import subprocess
import sys

import pytest

from vllm_dwdp.paper import (
    DERIVED,
    DIFFERENCES,
    FITTED,
    NOT_MODELLED,
    NUM_PUBLISHED,
    TOLERANCE,
    Row,
    chunk_curve,
    chunk_rows,
    paper_rows,
    why_missed,
)
from vllm_dwdp.paper.chunks import full_step_gain, mi355x_model


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return paper_rows()


def test_85_percent_of_the_rows_are_within_5_percent(rows: list[Row]) -> None:
    assert TOLERANCE == 0.05
    assert sum(row.is_reached for row in rows) >= 0.85 * len(rows)
    assert len(rows) >= 0.85 * NUM_PUBLISHED
    counted = sum(int(what.split(" figures")[0].split(", ")[-1]) for what, _ in NOT_MODELLED)
    assert len(rows) + counted == NUM_PUBLISHED


def test_what_needs_no_factor_is_all_reached(rows: list[Row]) -> None:
    exact = [row for row in rows if row.kind in ("predicted", "derived")]
    assert sum("roofline" in row.source for row in exact) == 8
    assert len(exact) >= 41
    assert all(row.is_reached for row in exact)


def test_contention_is_met_to_the_last_digit(rows: list[Row]) -> None:
    meeting = [row for row in rows if row.source == "contention at a source"]
    assert len(meeting) == 25
    assert all(row.model == pytest.approx(row.published, abs=0.006) for row in meeting)


def test_every_fitted_row_is_marked_and_every_mark_has_a_factor(rows: list[Row]) -> None:
    named = {name for factor in FITTED.values() for name in factor.rows}
    marked = {f"{row.source}: {row.quantity}" for row in rows if row.kind == "fitted"}
    assert marked == named
    assert len(marked) < 0.2 * len(rows)


@pytest.mark.parametrize("name", sorted(FITTED))
def test_a_factor_is_what_its_rows_say(rows: list[Row], name: str) -> None:
    """The rows that a factor was fitted on are met in the mean: another value would not be a fit."""
    fitted = [row for row in rows if f"{row.source}: {row.quantity}" in FITTED[name].rows]
    mean = sum(math.log(row.model / row.published) for row in fitted) / len(fitted)
    assert abs(mean) < (0.015 if name == "merge_passes" else 0.004)


def test_rows_that_follow_from_fitted_ones_are_marked(rows: list[Row]) -> None:
    derived = {f"{row.source}: {row.quantity}" for row in rows if row.kind == "derived"}
    assert set(DERIVED) < derived
    assert derived - set(DERIVED) == {
        "power, % of TDP: attention (96.7) + copies (30.5) - idle (12.9)"
    }


def test_no_row_only_repeats_the_published_figure(rows: list[Row]) -> None:
    """But for probabilities rounded to two digits, and ratios that are one."""
    equal = [row for row in rows if row.model == row.published]
    assert all(
        row.source == "contention at a source" or row.published in (1.0, 22.5) for row in equal
    )


def test_every_miss_has_a_reason(rows: list[Row]) -> None:
    missed = [row for row in rows if not row.is_reached]
    assert missed
    assert all(why_missed(row) != "unexplained" for row in missed)


def test_the_command_says_it_all(rows: list[Row]) -> None:
    command = [sys.executable, "-m", "vllm_dwdp.entrypoints.cli.main", "paper"]
    ended = subprocess.run(
        [*command, "--json"], capture_output=True, text=True, check=True, timeout=120
    )
    content = json.loads(ended.stdout)
    assert set(content["rows"][0]) == {"source", "quantity", "published", "model", "kind"}
    assert len(content["rows"]) == len(rows)
    assert set(content["fitted"]) == set(FITTED)
    assert len(content["chunk_curve"]) == 7
    assert content["differences"] == list(DIFFERENCES)
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert f"of {NUM_PUBLISHED}" in " ".join(ended.stdout.split())
    assert "Not modelled:" in ended.stdout


def test_the_old_flag_names_the_new_command() -> None:
    command = [sys.executable, "-m", "vllm_dwdp.entrypoints.cli.main", "simulate", "--paper"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "fitted factors" in ended.stdout
    assert ended.stderr.startswith("simulate --paper is now vllm-dwdp paper")
    assert len(ended.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def curve() -> dict[tuple[int, int], Row]:
    """Return the chunk curve of the other machine, by chunk and input tokens."""
    published = {}
    for row in chunk_rows():
        chunk, tokens = (int(number) for number in re.findall(r"\d+", row.quantity))
        published[chunk, tokens] = row
    assert len(published) == 7
    return published


@pytest.mark.parametrize("tokens", [4096, 8192, 16384])
def test_chunks_of_4096_lose_as_much_as_published(
    curve: dict[tuple[int, int], Row], tokens: int
) -> None:
    """On a machine of which no factor was fitted: only its data sheet."""
    assert abs(curve[4096, tokens].error) < 0.08


def test_chunks_of_32768_win_where_a_prompt_fills_half_of_one(
    curve: dict[tuple[int, int], Row],
) -> None:
    for tokens in (16384, 32768):
        row = curve[32768, tokens]
        assert row.published > 1 and row.model > 1
        assert -0.4 < row.error < 0, "the published expert parallelism is slower than the model's"


def test_short_prompts_in_large_chunks_are_not_met_and_said_to_differ(
    curve: dict[tuple[int, int], Row],
) -> None:
    """As if the step held less than its chunk; a model of so small a step loses too."""
    for tokens in (4096, 8192):
        row = curve[32768, tokens]
        assert row.published < 1 < row.model
        assert full_step_gain(mi355x_model(), tokens, tokens) < 0.7
    assert any("4,096 and 8,192" in sentence for sentence in DIFFERENCES)


def test_the_other_machine_counts_in_nothing(rows: list[Row]) -> None:
    assert not any("MI355X" in row.source for row in rows)
    series = chunk_curve(16384)
    assert series["published"] == ([4096.0, 32768.0], [0.385, 1.209])
    gains = series["model"][1]
    assert gains == sorted(gains) and gains[0] < 0.5 and gains[-1] > 1


@pytest.mark.parametrize(
    ("band", "published"), [("20-30", 1.10), ("40-50", 1.08), ("60-70", 1.10), ("80-90", 1.06)]
)
def test_end_to_end_from_20_to_100_tokens_per_user_is_met(
    rows: list[Row], band: str, published: float
) -> None:
    (row,) = (r for r in rows if r.quantity == f"TPS/GPU, at {band}")
    assert row.published == published
    assert abs(row.error) < 0.03
