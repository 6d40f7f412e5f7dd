"""Ranks of several GPUs, layers that draft, and copies as the runtime cuts them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.planner.models import QWEN3_30B, TRAFFIC, break_even, run_plan
from vllm_dwdp.device.cuda_queue import CudaQueue
from vllm_dwdp.entrypoints.cli.options import Dtypes, cost_model
from vllm_dwdp.paper import DEEPSEEK_R1
from vllm_dwdp.planner.cost import CostModel
from vllm_dwdp.planner.disaggregated_plan import DecodeServers, Feeding
from vllm_dwdp.planner.estimates import speedups
from vllm_dwdp.planner.memory import memory_bytes
from vllm_dwdp.planner.plan import make_plan
from vllm_dwdp.planner.simulate import SLICE_MIB

DTYPES = Dtypes(experts="nvfp4", dense="", kv_cache="")
KV_TOKEN = {size: f"KV cache per token, {size} of {size} layers" for size in (48, 61)}


def model_of(folder: Path, config: dict[str, Any], tensor_parallel_size: int = 1) -> CostModel:
    file = folder / "config.json"
    file.write_text(json.dumps(config))
    return cost_model(file, "gb200", 4, DTYPES, None, tensor_parallel_size=tensor_parallel_size)


def figures_of(model: CostModel) -> dict[str, float | None]:
    return {each.quantity: each.low for each in make_plan(model, TRAFFIC).figures}


@pytest.mark.parametrize("config", [DEEPSEEK_R1, QWEN3_30B])
def test_the_gpus_of_a_rank_divide_its_experts_copies_and_steps(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    one, two = (model_of(tmp_path, config, size) for size in (1, 2))
    assert memory_bytes(two).experts == memory_bytes(one).experts, "a rank holds what it held"
    assert two.prefetch == pytest.approx(one.prefetch / 2)
    step = TRAFFIC.prefill_step
    assert two.step_seconds(step).compute < 0.7 * one.step_seconds(step).compute
    usable = memory_bytes(two).kv_cache - memory_bytes(one).kv_cache
    assert usable == pytest.approx(0.9 * one.hardware.memory_gb * 1e9)


def test_each_gpu_keeps_all_of_a_latent_and_its_share_of_the_heads(tmp_path: Path) -> None:
    def per_token(config: dict[str, Any], size: int, layers: int) -> float:
        found = figures_of(model_of(tmp_path, config, size))[KV_TOKEN[layers]]
        assert found is not None
        return found

    assert per_token(DEEPSEEK_R1, 2, 61) == pytest.approx(2 * per_token(DEEPSEEK_R1, 1, 61))
    assert QWEN3_30B["num_key_value_heads"] == 4
    for size, copies in ((2, 1), (4, 1), (8, 2)):
        found = per_token(QWEN3_30B, size, 48)
        assert found == pytest.approx(copies * per_token(QWEN3_30B, 1, 48)), size


def test_what_hides_copies_and_what_is_gained_hardly_depend_on_it(tmp_path: Path) -> None:
    one, two = (model_of(tmp_path, QWEN3_30B, size) for size in (1, 2))
    assert break_even(two) == pytest.approx(break_even(one), rel=0.02)
    gains = [speedups(each, TRAFFIC)["balanced"] for each in (one, two)]
    assert gains[0] == pytest.approx(gains[1], rel=0.02)


def test_the_command_names_the_gpus_of_a_rank(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(QWEN3_30B))
    arguments = ("--model", str(file), "--gpu", "h100", "--tensor-parallel-size", "2")
    shown = " ".join(run_plan(*arguments).stdout.split())
    assert "on 4 x 2 x h100" in shown
    assert "all-reduces" in shown
    wrong = run_plan(*arguments[:-1], "0")
    assert "--tensor-parallel-size is 0; it must be a whole number of at least 1." in wrong.stderr


def test_ranks_of_several_gpus_feed_decode_servers_of_one_rank_per_gpu(tmp_path: Path) -> None:
    """Half as many ranks, each twice as fast, in front of the same decode servers."""
    one, two = (model_of(tmp_path, DEEPSEEK_R1, size) for size in (1, 2))
    servers = DecodeServers(number=1, num_gpus=16, tokens_per_user=50)
    chat = replace(TRAFFIC, output_tokens=1024)
    narrow, wide = (
        Feeding(model=ranks, decode_model=one, traffic=chat, servers=servers)
        for ranks in (one, two)
    )
    assert wide.requests_per_s == pytest.approx(narrow.requests_per_s)
    for before, after in zip(narrow.sides, wide.sides, strict=True):
        assert after.chunk == before.chunk
        assert after.tokens_per_s == pytest.approx(2 * before.tokens_per_s, rel=0.01)
        assert wide.ranks(after) == pytest.approx(narrow.ranks(before) / 2, rel=0.01)
    dwdp, dep = (2 * 0.9 * 8192 / side.tokens_per_s for side in wide.sides)
    decoding = 16 / wide.requests_per_s
    gpu_seconds_of_a_request = dep + decoding, dwdp + decoding
    expected = gpu_seconds_of_a_request[0] / gpu_seconds_of_a_request[1]
    assert wide.gain_of_both == pytest.approx(expected), "a rank costs two GPUs"
    assert wide.gain_of_both == pytest.approx(narrow.gain_of_both, rel=0.01)


def test_a_decode_server_gets_each_head_once(tmp_path: Path) -> None:
    """Ranks of eight GPUs keep each of four heads twice; 48 layers, 2 x 128 elements, two bytes."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(QWEN3_30B))
    arguments = ("--model", str(file), "--gpu", "h100", "--tensor-parallel-size", "8", "--json")
    told = json.loads(run_plan(*arguments, "--decode-servers", "1").stdout)
    figures = {line["quantity"]: line["low"] for line in told["lines"]}
    assert figures[KV_TOKEN[48]] == pytest.approx(2 * 98_304 / 1e3)
    arriving = figures["prompt tokens for one decode server"] * 98_304 / 1e9
    assert figures["KV cache that arrives at one decode server"] == pytest.approx(arriving)
    (said,) = (said for said in told["advice"] if "vllm-dwdp launch" in said)
    assert "DWDP ranks of 8 GPUs feed them" in said
    assert "--tensor-parallel-size 8 " in said
    assert said.endswith(
        '--decode-args "--tensor-parallel-size 1 --data-parallel-size 16 --enable-expert-parallel"'
    )


def test_layers_that_draft_need_experts_and_slots_of_their_own(tmp_path: Path) -> None:
    drafts = "experts and slots of its MTP layers, if they draft"
    without = figures_of(model_of(tmp_path, DEEPSEEK_R1))
    assert drafts not in without
    for num_layers, num_slots in ((1, 1), (2, 2), (3, 2)):
        model = model_of(tmp_path, DEEPSEEK_R1 | {"num_nextn_predict_layers": num_layers})
        resident = num_layers * model.resident_experts * model.shape.expert_bytes
        wanted = (resident + num_slots * model.remote_bytes) / 1e9
        found = figures_of(model)
        assert found.pop(drafts) == pytest.approx(wanted)
        assert found == without, "it is not counted elsewhere"


def test_copies_are_simulated_in_slices_of_the_runtime() -> None:
    assert CudaQueue.slice_bytes == SLICE_MIB * 2**20
