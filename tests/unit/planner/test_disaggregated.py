"""`plan --decode-servers`: the arithmetic of prefill ranks that feed decode servers."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.planner.models import QWEN3_30B, TRAFFIC, r1_on_gb200, run_plan
from vllm_dwdp.paper import DEEPSEEK_R1
from vllm_dwdp.planner.cost import CostModel, Exchange
from vllm_dwdp.planner.disaggregated import (
    CHUNKS,
    Service,
    chunk_rates,
    decode_batch,
    gpu_seconds,
    lone_prompt,
    recommended,
    requests_per_s,
)
from vllm_dwdp.planner.disaggregated_plan import DecodeServers, Feeding, plan_feeding
from vllm_dwdp.planner.estimates import direct_step
from vllm_dwdp.planner.hardware import DEFAULT, find_hardware
from vllm_dwdp.planner.model_shape import shape_of
from vllm_dwdp.planner.step import Step

CHAT = replace(TRAFFIC, output_tokens=1024)


def feeding(number: int = 1, num_gpus: int = 16, users: float = 50.0, **changes: Any) -> Feeding:
    model = r1_on_gb200(**({"efficiency": DEFAULT} | changes))
    return Feeding(
        model=model,
        decode_model=model,
        traffic=CHAT,
        servers=DecodeServers(number=number, num_gpus=num_gpus, tokens_per_user=users),
    )


def test_prefill_ranks_compute_what_the_decode_servers_take() -> None:
    made = feeding()
    for side in made.sides:
        computed = made.ranks(side) * side.tokens_per_s
        assert computed == pytest.approx(made.requests_per_s * 0.9 * 8192)
    assert made.requests_per_s == pytest.approx(16 * made.batch.size * 50 / 1024)


def test_ranks_are_started_in_whole_groups_for_all_servers() -> None:
    for number in (1, 2, 3):
        made = feeding(number)
        dwdp = made.sides[0]
        started = made.ranks_to_start(dwdp)
        assert started % 4 == 0
        assert started - 4 < number * made.ranks(dwdp) <= started


def test_a_decode_batch_keeps_its_speed_and_fits() -> None:
    model = r1_on_gb200(efficiency=DEFAULT)
    service = Service(input_tokens=8192, output_tokens=1024, tokens_per_user=50)
    batch = decode_batch(model, service)
    server = replace(model, group_size=16)
    step = server.dep_step(Step.decode(batch.by_speed, 8704))
    assert step == pytest.approx(1 / 50, rel=0.01)
    kv_bytes = batch.by_memory * 8704 * model.shape.kv_bytes_per_token(8704)
    weights = model.shape.experts_bytes / 16 + model.shape.dense_bytes
    assert kv_bytes + weights == pytest.approx(0.9 * 186e9)
    slow = replace(service, tokens_per_user=20)
    found = decode_batch(model, slow)
    assert found.size == found.by_memory == batch.by_memory < found.by_speed
    seconds = 16 / requests_per_s(model, slow)
    assert gpu_seconds(model, slow, 1e4) == pytest.approx((0.8192, seconds))


def test_wider_decode_servers_need_more_prefill_ranks() -> None:
    narrow, wide = feeding(num_gpus=8), feeding(num_gpus=32)
    assert wide.ranks(wide.sides[0]) > 4 * narrow.ranks(narrow.sides[0])


def test_the_chunk_is_the_smallest_that_does_nearly_everything() -> None:
    assert recommended([(1, 50.0), (2, 97.0), (4, 98.5), (8, 100.0)]) == (4, 98.5)
    made = feeding()
    curve = {rates.chunk: rates for rates in made.curve}
    assert tuple(curve) == CHUNKS, "the one that was asked for is among them"
    gains = [rates.gain for rates in made.curve]
    assert gains == sorted(gains), "the larger the step, the better are copies hidden"
    dwdp, dep = made.sides
    assert dwdp.tokens_per_s == curve[dwdp.chunk].dwdp
    assert dep.chunk < dwdp.chunk, "expert parallelism has no copies to hide"


def test_another_chunk_is_compared_and_judged() -> None:
    small = replace(feeding(), traffic=replace(CHAT, max_num_batched_tokens=2048))
    assert small.curve[0].chunk == 2048
    advice = plan_feeding(small).advice
    rate = small.curve[0].dwdp / small.sides[0].tokens_per_s
    assert rate < 0.5
    assert any(f"computes {rate:.2f} of the prompt tokens" in said for said in advice)
    assert not any("of the prompt tokens that" in said for said in plan_feeding(feeding()).advice)


def test_a_lone_prompt_takes_its_chunks() -> None:
    model = r1_on_gb200(efficiency=DEFAULT)
    whole, halves = (lone_prompt(model, 8192, chunk) for chunk in (8192, 4096))
    step = Step.prefill(8192, 8192)
    assert whole[0] == pytest.approx(model.dwdp_step(step), rel=0.02)
    copies = model.shape.num_moe_layers * model.prefetch
    assert halves[0] >= 2 * copies
    assert whole[1] < whole[0], "one prompt does not hide its copies"
    said = plan_feeding(feeding()).advice
    assert any("at low load DWDP answers later" in sentence for sentence in said)


def test_the_command_is_the_one_that_launch_takes() -> None:
    made = feeding(2)
    (said,) = (s for s in plan_feeding(made).advice if "vllm-dwdp launch" in s)
    ranks, chunk = made.ranks_to_start(made.sides[0]), made.sides[0].chunk
    assert f"--ranks {ranks} --decode-servers 2 --max-num-batched-tokens {chunk}" in said
    assert """--additional-config '{"dwdp": {"group_size": 4}}'""" in said
    one_group = feeding(1, num_gpus=1, users=1, shape=shape_of(QWEN3_30B))
    assert one_group.ranks_to_start(one_group.sides[0]) == 4
    assert not any("group_size" in said for said in plan_feeding(one_group).advice)


@pytest.mark.parametrize(
    ("number_of_gpus", "users", "message"),
    [
        (1, 50.0, "A decode server of 1 GPU does not fit: a GPU lacks 2"),
        (16, 1e6, "No decode server of 16 GPUs gives a user 1e+06 tokens/s"),
    ],
)
def test_servers_that_serve_nobody_are_said_to(
    number_of_gpus: int, users: float, message: str
) -> None:
    made = plan_feeding(feeding(num_gpus=number_of_gpus, users=users))
    (said,) = made.advice
    assert said.startswith(message)
    assert all(figure.unit != "ranks" for figure in made.figures)


def test_where_expert_parallelism_wins_the_plan_says_so() -> None:
    slowed = replace(DEFAULT, beside_copies=0.2)
    made = feeding(efficiency=slowed, exchange=Exchange.PER_RANK)
    assert made.gain_of_both < 1
    assert plan_feeding(made).advice[0].startswith("Keep expert parallelism")
    assert not any("Keep" in said for said in plan_feeding(feeding()).advice)


def test_the_gain_of_both_sides_is_diluted_by_decode() -> None:
    made = feeding()
    dwdp, dep = made.sides
    assert 1 < made.gain_of_both < dwdp.tokens_per_s / dep.tokens_per_s
    more_decode = feeding(users=100)
    assert more_decode.gain_of_both < made.gain_of_both


def test_ranks_that_read_in_place_copy_nothing() -> None:
    cpu = find_hardware("epyc-2core")
    model = CostModel(
        shape=shape_of(QWEN3_30B), hardware=cpu, efficiency=cpu.efficiency, group_size=2
    )
    rates = chunk_rates(model, 2048, 1024)
    assert rates.dwdp == pytest.approx(1024 / direct_step(model, Step.prefill(1024, 2048)))


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "config.json").write_text(json.dumps(DEEPSEEK_R1))
    return run_plan("--model", str(folder), "--expert-dtype", "nvfp4", *arguments)


def test_the_option(tmp_path: Path) -> None:
    without = json.loads(run(tmp_path, "--json").stdout)
    answer = json.loads(run(tmp_path, "--decode-servers", "2", "--json").stdout)
    assert answer["lines"][: len(without["lines"])] == without["lines"]
    added = {line["quantity"]: line for line in answer["lines"][len(without["lines"]) :]}
    assert added["ranks to start, DWDP"]["low"] % 4 == 0
    assert added["DWDP over expert parallelism, steps of 4,096"]["low"] < 1
    assert any("vllm-dwdp launch MODEL" in said for said in answer["advice"])
    assert any("Decode servers divide the experts over 16 GPUs" in s for s in answer["assumptions"])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--decode-servers", "-1"), "--decode-servers is -1; it must be a whole number of at"),
        (("--decode-gpus", "0"), "--decode-gpus is 0; it must be a whole number of at least 1."),
        (("--tokens-per-user", "0"), "--tokens-per-user is 0.0; it must be a number above 0."),
        (("--output-tokens", "0"), "--output-tokens is 0; it must be a number of at least 1"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(
    tmp_path: Path, option: tuple[str, str], message: str
) -> None:
    servers = () if option[0] == "--decode-servers" else ("--decode-servers", "1")
    ended = run(tmp_path, *servers, *option)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"vllm-dwdp: {message}"), ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
