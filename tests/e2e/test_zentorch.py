"""With zentorch on an AMD processor, ranks answer what stock vLLM answers there.

vLLM then packs the experts' weights for another kernel while it processes them: a rank that builds its
kernels anew, without that knowledge, computes with packed weights as if they were plain.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Checkpoints
from tests.helpers import zentorch
from tests.helpers.engines import ENGINE, ROOT
from vllm_dwdp.entrypoints.launch.ports import free_ports

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

DEADLINE_S = 300


@pytest.fixture(scope="module")
def python(request: pytest.FixtureRequest) -> Path:
    """Return an interpreter that has zentorch."""
    try:
        return zentorch.interpreter(Path(request.config.cache.mkdir("zentorch")))
    except zentorch.Unavailable as reason:
        pytest.skip(str(reason))


def kernels(worker: Any) -> dict[str, Any]:
    """Report, of a case, whether each layer of experts runs zentorch's kernel."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    layers = worker.model_runner.get_model().modules()
    experts = [layer for layer in layers if isinstance(layer, RoutedExperts)]
    used = [layer.quant_method.moe_kernel.fused_experts._use_zentorch for layer in experts]
    return {"zentorch": used}


def run(python: Path, folder: Path, case: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the results of a case by rank, each rank in a process of that interpreter."""
    (case["port"],) = free_ports(1)
    listing = folder / f"{case['name']}.json"
    listing.write_text(json.dumps([case]))
    ranks = range(case.get("num_ranks", 1))
    outputs = [folder / f"{case['name']}-{rank}.out" for rank in ranks]
    logs = [output.with_suffix(".log") for output in outputs]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank, output, log in zip(ranks, outputs, logs, strict=True):
            command = [python, "-m", "tests.e2e.engine_process", listing, str(rank), output]
            with log.open("wb") as file:
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=os.environ | ENGINE | {"PYTHONPATH": str(ROOT)},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            processes.append(process)
        codes = [process.wait(DEADLINE_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for code, log in zip(codes, logs, strict=True):
        assert code == 0, f"{log.name} ended with {code}:\n{log.read_text()[-6000:]}"
    return [json.loads(output.read_text()) for output in outputs]


@pytest.fixture(scope="module")
def stock(
    python: Path, checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Return what stock vLLM answers with zentorch."""
    case = model_of(checkpoints) | {"name": "stock"}
    (result,) = run(python, tmp_path_factory.mktemp("stock"), case)
    return result


def model_of(checkpoints: Checkpoints) -> dict[str, Any]:
    return {"model": checkpoints("qwen3_moe", 7), "report": f"{__name__}:kernels"}


def test_stock_vllm_runs_zentorchs_kernel(stock: dict[str, Any]) -> None:
    assert stock["zentorch"] and all(stock["zentorch"])
    assert len({token for tokens in stock["tokens"] for token in tokens}) > 20


@pytest.mark.feature("zentorch on AMD processors")
@pytest.mark.parametrize("mode", ["direct", "prefetch"])
def test_ranks_answer_as_stock_vllm_does(
    python: Path, stock: dict[str, Any], checkpoints: Checkpoints, tmp_path: Path, mode: str
) -> None:
    sharing = {"name": mode, "num_ranks": 2, "dwdp": {"mode": mode}}
    for rank in run(python, tmp_path, model_of(checkpoints) | sharing):
        assert rank["status"]["remote_expert_bytes"] > 0, "DWDP did not run"
        assert rank["zentorch"] == stock["zentorch"], f"rank {rank['rank']}: another kernel"
        assert rank["tokens"] == stock["tokens"], f"rank {rank['rank']}: other tokens"
