"""What deployments can do does not depend on the load that was simulated."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.planner.models import GLM_4_5, r1_on_gb200
from vllm_dwdp.entrypoints.cli.simulate import SimulationReport
from vllm_dwdp.planner.capacity import backlog, dep_capacity, dwdp_capacity
from vllm_dwdp.planner.disaggregated import Service
from vllm_dwdp.planner.hardware import DEFAULT
from vllm_dwdp.planner.simulate import (
    Outcome,
    coarsened,
    default_pulls,
    dwdp_step,
    lockstep,
    percentile,
    pulls_for,
    simulate_dep,
    simulate_dwdp,
    step_of,
)
from vllm_dwdp.planner.traffic import Request, poisson_traffic


def traffic(rate: float, num_requests: int = 400) -> list[Request]:
    return poisson_traffic(
        num_requests=num_requests,
        requests_per_s=rate,
        input_tokens=8192,
        smallest_share=0.8,
        seed=0,
    )


def test_capacity_does_not_depend_on_the_rate() -> None:
    model = r1_on_gb200(efficiency=DEFAULT)

    def report(rate: float) -> list[float]:
        made = SimulationReport(
            model=model,
            requests=traffic(rate),
            service=Service(input_tokens=7373, output_tokens=1024, tokens_per_user=50),
            max_tokens=16384,
            routing_skew=1.1,
            slice_mib=2.0,
            pulls=default_pulls(model),
        )
        return [row["output_tokens_per_s_per_gpu_always_busy"] for row in made.rows]

    idle, busy = report(0.2), report(100.0)
    assert idle == pytest.approx(busy, rel=0.01)
    assert idle[0] == pytest.approx(idle[1], rel=0.1), "DEP's idle ranks are no work of DEP's"


def test_capacity_is_what_a_full_queue_gets() -> None:
    model, prompts = r1_on_gb200(efficiency=DEFAULT), traffic(1e6, 2000)
    dep = simulate_dep(model, prompts, max_tokens=16384, routing_skew=1.1).tokens_per_s
    dwdp = simulate_dwdp(model, prompts, max_tokens=16384).tokens_per_s
    assert dep_capacity(model, prompts, max_tokens=16384, routing_skew=1.1) == pytest.approx(
        dep, rel=0.02
    )
    assert dwdp_capacity(model, prompts, max_tokens=16384) == pytest.approx(dwdp, rel=0.02)


def test_a_backlog_lasts_for_every_rank() -> None:
    one = [Request(arrival_s=9.0, input_tokens=100)]
    waiting = backlog(one, 4, 1000)
    assert sum(request.input_tokens for request in waiting) >= 4 * 32 * 1000
    assert {request.arrival_s for request in waiting} == {0.0}
    assert len(backlog([Request(arrival_s=0, input_tokens=1)], 72, 16384)) == 20_000


def test_one_definition_of_a_percentile() -> None:
    times = tuple(float(number) for number in range(1, 101))
    outcome = Outcome(num_steps=1, tokens_per_s=1.0, busy=1.0, ttft_s=times)
    assert outcome.percentile(99) == percentile(times, 99) == 99.0
    assert replace(outcome, ttft_s=(1.0, 2.0)).percentile(50) == 1.0


def test_slices_are_what_was_asked_for_or_the_report_says_so() -> None:
    model = r1_on_gb200(efficiency=DEFAULT)
    share_mib = model.remote_bytes / 3 / 2**20
    quarter = pulls_for(model, share_mib / 4, "rotated")
    assert quarter.slices_per_peer == 4
    assert pulls_for(model, share_mib / 40, "rotated").slices_per_peer == 40
    assert coarsened(model, share_mib / 4, quarter) == ""
    fine = pulls_for(model, 0.01, "rotated")
    assert f"simulated as {fine.slices_per_peer} of" in coarsened(model, 0.01, fine)


def test_a_later_chunk_costs_the_same_in_plan_and_in_simulate() -> None:
    """A prompt of 131,072 tokens in steps of 8,192: the mean of its steps is plan's step."""
    from vllm_dwdp.planner.simulate import Chunk
    from vllm_dwdp.planner.step import Step

    model, prompt = r1_on_gb200(efficiency=DEFAULT), Request(arrival_s=0, input_tokens=131072)
    steps = [step_of([Chunk(prompt, at, at + 8192)]) for at in range(0, 131072, 8192)]
    planned = Step.prefill(8192, 131072)
    mean = sum(lockstep(model, [step] * 4) for step in steps) / len(steps)
    assert model.dep_step(planned) == pytest.approx(mean, rel=0.01)
    waited = sum(dwdp_step(model, step, default_pulls(model)) for step in steps) / len(steps)
    assert model.dwdp_step(planned) == pytest.approx(waited, rel=0.05)


def test_a_model_that_does_not_fit_is_said_to(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GLM_4_5))
    command = [sys.executable, "-m", "vllm_dwdp.entrypoints.cli.main", "simulate"]
    command += ["--model", str(tmp_path), "--gpu", "h100", "--ranks", "2", "--requests", "3"]
    ended = subprocess.run(
        [*command, "--json"], capture_output=True, text=True, check=True, timeout=120
    )
    content = json.loads(ended.stdout)
    assert any("It does not fit: a rank lacks" in said for said in content["warnings"])
    assert any("--routing-skew" in said for said in content["assumptions"])
    ended = subprocess.run(
        [*command, "--kv-dtype", "fp8"], capture_output=True, text=True, check=True, timeout=120
    )
    assert "It does not fit" in ended.stdout
