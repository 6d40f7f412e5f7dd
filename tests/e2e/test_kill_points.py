"""SIGKILL at named points of a rank's life: the other ends with a named error, or serves on.

Three more ranks are killed at random moments, five times or, in `make test-all`, `DWDP_KILLS` times
(`DWDP_SEED`): engines without a server around them; `test_survival` does the same to whole servers.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Checkpoints
from tests.e2e.rank_lives import BEFORE_SERVING, JOIN_TIMEOUT_S, WHILE_SERVING
from tests.helpers.engines import fork

NUM_KILLS = int(os.environ.get("DWDP_KILLS", "30"))
SEED = os.environ.get("DWDP_SEED", "5")

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400 + 20 * NUM_KILLS)]


def run_lives(first: str, folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """Return what `rank_lives` found, and its log; `first` is a checkpoint, or what to do."""
    results, log = folder / "results.json", folder / "lives.log"
    command = ["-m", "tests.e2e.rank_lives", first, str(results), *arguments]
    process = fork(command, log)
    try:
        code = process.wait(timeout=380 + 20 * NUM_KILLS)
    finally:
        process.kill()
    assert code == 0, log.read_text()[-6000:]
    return json.loads(results.read_text()), log.read_text()


def must_not_have_grown(grown: dict[str, int]) -> None:
    """Compare with when it began to serve: its peers may still have been connecting then."""
    assert grown.pop("anonymous_bytes") < 16 * 2**20, grown
    assert grown.pop("fds") <= 0, grown
    assert not any(grown.values()), grown


def test_killed_at_every_named_point(checkpoints: Checkpoints, tmp_path: Path) -> None:
    found, log = run_lives(checkpoints("mixtral", 8), tmp_path)
    for point in BEFORE_SERVING:
        victim, other, took = found[point]
        assert victim["code"] == -9, (point, victim)
        assert other["error"].startswith("JoinTimeoutError: ranks [0] of group 0 did not"), other
        assert f"join_timeout_s={JOIN_TIMEOUT_S:g}" in other["error"]
        assert not any(other["left"].values()), other
        assert took["seconds"] < 60

    # A peer that restarts before it was ready is mapped anew: its first memory never became whole.
    killed, waiting, again = found["restarted"]
    assert killed["code"] == -9
    assert waiting["tokens"] == again["tokens"], found["restarted"]
    for life in (waiting, again):
        assert not any(life["left"].values()), life

    survivor, returned = found["survivor"], found["returned"]
    for point in WHILE_SERVING:
        assert found[point]["code"] == -9, (point, found[point])
    assert returned["tokens"] == survivor["tokens"], "the rank that came back answers as before"
    assert survivor["num_different"] == 0
    assert survivor["num_rounds"] > len(WHILE_SERVING)
    assert survivor["longest_s"] < 20
    assert "dead" in survivor["states"] and "ready" in survivor["states"]
    assert survivor["last_failure"] == "rank 0 died: it no longer listens"
    must_not_have_grown(survivor["grown"])
    assert "adopted" in log, "no life found its experts at the survivor"


@pytest.mark.parametrize("num_kills", [5, pytest.param(NUM_KILLS, marks=pytest.mark.slow)])
def test_killed_at_random_moments(checkpoints: Checkpoints, tmp_path: Path, num_kills: int) -> None:
    found, log = run_lives(checkpoints("mixtral", 8), tmp_path, str(num_kills), SEED)
    back = found.pop("back_after_s")
    print(found, f"back after {back[len(back) // 2]:.1f} s (median), {back[-1]:.1f} s (longest)")
    assert found["num_different"] == 0 and not found["tokens_differ"]
    assert found["num_answers"] > 10 * num_kills
    assert log.count("adopted") == num_kills
    assert max(found["kills_survived"]) >= num_kills // 2, "no life saw enough deaths to leak"
    for grown in found["grown"]:
        must_not_have_grown(grown)
