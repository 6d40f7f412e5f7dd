"""Kills of a launch's ranks, some of all at once: `DWDP_KILLS` of them; see `launch_kills`."""

import os
from pathlib import Path

import pytest

from tests.e2e.conftest import Checkpoints
from tests.e2e.launch_kills import Campaign, Launch

NUM_KILLS = int(os.environ.get("DWDP_KILLS", "20"))
SEED = int(os.environ.get("DWDP_SEED", "5"))
NUM_RANKS = 2

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(300 + 60 * NUM_KILLS)]


@pytest.mark.feature("`vllm-dwdp launch`: kills cost the others nothing")
def test_survivors_notice_no_kill_and_nobody_loads_twice(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    pytest.importorskip("vllm_router")
    launch = Launch(checkpoints("mixtral", 8), tmp_path, NUM_RANKS)
    try:
        result = Campaign(launch, NUM_RANKS, SEED).run(NUM_KILLS)
    finally:
        launch.end()
    print(result)
    assert result.failures == [] and result.num_different == 0
    assert result.num_answers > 5 * NUM_KILLS
    assert result.num_all_at_once == NUM_KILLS // 10
    assert result.num_loaded == NUM_RANKS, "nobody read its experts from disk again"
    assert result.num_adopted >= NUM_KILLS - result.num_while_returning
    assert 0.9 * result.experts_bytes < result.experts_pss <= result.experts_bytes
