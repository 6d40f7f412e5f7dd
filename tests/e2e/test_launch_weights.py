"""New weights for the ranks of a launch by its control port, and a rank that is killed after them."""

import shutil
from pathlib import Path

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
    """What was written over the checkpoint is adopted again; a rank with another one is refused."""
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

    def answers(port: int) -> list[list[int]]:
        return [server_at(port).tokens(prompt, max_tokens=12) for prompt in PROMPTS]

    try:
        launch.wait_for("all 2 ranks serve at")
        ports = launch.rank_ports()
        for port in ports.values():
            assert answers(port) == expected[old]

        scratch = tmp_path / "model.safetensors"
        shutil.copy(Path(new, "model.safetensors"), scratch)
        scratch.replace(served / "model.safetensors")  # a trainer's next step, in the same folder
        reload()
        for port in ports.values():
            assert answers(port) == expected[new]
        assert launch.kill(1, "engine")
        wait_until(lambda: launch.log.read_text().count("all 2 ranks serve at") == 2, 240)
        for port in launch.rank_ports().values():
            assert answers(port) == expected[new]
        _, told = ask(control + "/collective_rpc", {"method": "dwdp_status"})
        ranks = [rank["answer"]["results"][0] for rank in told["ranks"]]
        assert [rank["adopted"] for rank in ranks] == [False, True]
        assert [rank["weight_update"] for rank in ranks] == [1, 1]
        assert len({rank["weights"] for rank in ranks}) == 1
        assert all(sum(rank["steps"].values()) for rank in ranks)

        reload(weights_path=old)
        for port in ports.values():
            assert answers(port) == expected[old]
        assert launch.kill(1, "server")
        launch.wait_for("have been updated since it started (update 2): start with")
        assert answers(ports[0]) == expected[old], "the survivor serves on"
        assert launch.kill(0, "server")
        wait_until(lambda: launch.log.read_text().count("all 2 ranks serve at") == 3, 240)
        for port in launch.rank_ports().values():
            assert answers(port) == expected[new], "all began anew with what launch was given"
    finally:
        launch.end()
