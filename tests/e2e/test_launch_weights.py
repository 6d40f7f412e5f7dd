"""New weights for the ranks of a launch by its control port, and a rank that is killed after them."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Checkpoints, StockEngine
from tests.e2e.engine_process import PROMPTS
from tests.e2e.launch_kills import Launch, server_at
from tests.e2e.test_launch_clients import ask
from tests.helpers.waiting import wait_until
from vllm_dwdp.entrypoints.launch.ports import free_ports

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

ARGUMENTS = ("--max-num-seqs", "1", "--max-num-batched-tokens", "64")


@pytest.mark.feature("`vllm-dwdp launch`: control requests to every rank")
@pytest.mark.feature("reload_weights")
def test_a_launch_serves_new_weights_on_all_ranks_and_after_a_kill(
    checkpoints: Checkpoints, stock: StockEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that is killed takes the weights of its group, from the first place or from another."""
    pytest.importorskip("vllm_router")
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    old, new = checkpoints("qwen3_moe", 8), checkpoints("qwen3_moe", 8, seed=1)
    expected = {path: found["tokens"] for path, found in stock.all([old, new]).items()}
    served = shutil.copytree(old, tmp_path / "served")
    (control_port,) = free_ports(1)
    control = f"http://127.0.0.1:{control_port}"
    options = ("--control-port", str(control_port), *ARGUMENTS)
    launch = Launch(str(served), tmp_path, 2, *options)

    def reload(**keywords: str) -> None:
        assert ask(control + "/pause?mode=keep")[0] == 200
        body = {"method": "reload_weights", "kwargs": keywords, "timeout": 100}
        status, answer = ask(control + "/collective_rpc", body)
        assert status == 200, answer
        assert ask(control + "/reset_prefix_cache")[0] == 200
        assert ask(control + "/resume")[0] == 200

    def answers_of_all() -> list[list[list[int]]]:
        servers = [server_at(port) for _, port in sorted(launch.rank_ports().items())]
        return [[one.tokens(prompt, max_tokens=12) for prompt in PROMPTS] for one in servers]

    def statuses() -> list[dict[str, Any]]:
        _, told = ask(control + "/collective_rpc", {"method": "dwdp_status"})
        return [rank["answer"]["results"][0] for rank in told["ranks"]]

    try:
        launch.wait_for("all 2 ranks serve at")
        assert answers_of_all() == [expected[old]] * 2

        scratch = Path(shutil.copy(Path(new, "model.safetensors"), tmp_path))
        scratch.replace(served / "model.safetensors")  # a trainer's next step, in the same folder
        reload()
        assert answers_of_all() == [expected[new]] * 2
        assert launch.kill(1, "engine")
        wait_until(lambda: launch.log.read_text().count("all 2 ranks serve at") == 2, 240)
        assert answers_of_all() == [expected[new]] * 2
        ranks = statuses()
        assert [rank["adopted"] for rank in ranks] == [False, True]
        assert [rank["weight_update"] for rank in ranks] == [1, 1]
        assert ranks[0]["weights"] == ranks[1]["weights"]
        assert all(sum(rank["steps"].values()) for rank in ranks)

        reload(weights_path=old)
        assert answers_of_all() == [expected[old]] * 2
        assert launch.kill(1, "server")
        wait_until(lambda: launch.log.read_text().count("all 2 ranks serve at") == 3, 240)
        assert answers_of_all() == [expected[old]] * 2, "launch starts it with another checkpoint"
        read = [rank["weights"]["checkpoint"] for rank in statuses() if rank["weight_update"] == 2]
        assert read == [str(Path(old).resolve())] * 2
        assert all(launch.kill(rank, "server") for rank in range(2))
        wait_until(lambda: launch.log.read_text().count("all 2 ranks serve at") == 4, 240)
        assert answers_of_all() == [expected[new]] * 2, "all began anew with what launch was given"
    finally:
        launch.end()
