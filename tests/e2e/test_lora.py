"""LoRA adapters on dense layers and on experts give the tokens of stock vLLM with the same adapters.

Every rank has every adapter whole, also its part of experts that other ranks hold.
"""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.adapters import ADAPTED_PROMPTS, DENSE, EXPERTS, NUM_TOKENS, make_adapter
from tests.e2e.conftest import Checkpoints, StockEngine
from tests.e2e.matrix import run_cases
from tests.helpers import triton_in_torch
from tests.helpers.engines import ROOT
from vllm_dwdp.entrypoints.launch.server import Server, serving
from vllm_dwdp.planner.adapters import Slots
from vllm_dwdp.planner.checkpoint import read_config
from vllm_dwdp.planner.model_shape import shape_of

pytestmark = [pytest.mark.e2e, pytest.mark.every_version, pytest.mark.timeout(600)]

LORA: dict[str, Any] = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
RACES = {"DWDP_DEBUG_POISON": "1", "DWDP_DEBUG_MAX_DELAY_US": "3000"}
Result = dict[str, Any]


@pytest.fixture(scope="module")
def adapters(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder, model = tmp_path_factory.mktemp("adapters"), checkpoints("qwen3_moe", 8)
    return {
        "dense": make_adapter(folder / "dense", model, DENSE, seed=1),
        "experts": make_adapter(folder / "experts", model, EXPERTS, seed=2),
    }


@pytest.fixture(scope="module")
def case(adapters: dict[str, str]) -> dict[str, Any]:
    return {
        "prepare": "tests.helpers.triton_in_torch:install",
        "drive": "tests.e2e.adapters:every_way",
        "report": "tests.e2e.adapters:expert_adapter_bytes",
        "adapters": adapters,
        "engine_args": LORA | {"max_num_seqs": 8},
    }


@pytest.fixture(scope="module")
def expected(stock: StockEngine, checkpoints: Checkpoints, case: dict[str, Any]) -> Result:
    return stock(checkpoints("qwen3_moe", 8), **case)


@pytest.fixture(scope="module")
def ranks(
    checkpoints: Checkpoints, case: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> list[Result]:
    """Results of both ranks in both modes."""
    listed = [
        {"name": mode, "model": checkpoints("qwen3_moe", 8), "num_ranks": 2, "dwdp": {"mode": mode}}
        | case
        for mode in ("direct", "prefetch")
    ]
    results = run_cases(tmp_path_factory.mktemp("lora"), "dwdp", listed, RACES)
    return [*results["direct"], *results["prefetch"]]


def tokens_of(results: list[Result], *names: str) -> list[list[Any]]:
    return [[result["tokens"][name] for name in names] for result in results]


def test_every_adapter_changes_the_tokens(expected: Result) -> None:
    """The reference, on which all other tests stand."""
    base, dense, experts = (expected["tokens"][name] for name in ("base", "dense", "experts"))
    for index in range(len(base)):
        assert base[index] != dense[index] != experts[index] != base[index]


def test_ranks_share_the_experts_under_the_adapters(expected: Result, ranks: list[Result]) -> None:
    assert len(ranks) == 4
    for result in ranks:
        assert expected["weights"] and result["weights"] == expected["weights"]
        status = result["status"]
        assert status["remote_expert_bytes"] > 0
        assert bool(status["fetched_bytes"]) == (result["name"] == "prefetch")
        num_layers, num_experts, hidden, inner = 3, 8, 160, 96
        a_slot = num_layers * num_experts * LORA["max_lora_rank"] * 3 * (hidden + inner) * 2
        assert result["adapter_bytes"] == LORA["max_loras"] * a_slot, "as docs/operations.md says"


OUTSIDE_LAYERS = ("model.embed_tokens", "logits_processor")
FAMILIES = ("qwen3_moe_mixed", "glm4_moe", "deepseek_v2")
"""Layers without experts between others, shared experts, multi-head latent attention."""


def test_the_planner_counts_the_slots_as_vllm_makes_them(
    checkpoints: Checkpoints, stock: StockEngine
) -> None:
    """All but those of embedding and head, which some of the families do not adapt."""
    models = {name: checkpoints(name, 8) for name in FAMILIES}
    settings = {"engine_args": LORA, "report": "tests.e2e.adapters:adapter_bytes"}
    prepared = {"prepare": "tests.helpers.triton_in_torch:install"}
    found = stock.all(list(models.values()), **settings, **prepared)
    slots = Slots(number=LORA["max_loras"], rank=LORA["max_lora_rank"])
    for name, model in models.items():
        made = found[model]["slot_bytes"]
        of_layers = sum(size for place, size in made.items() if place not in OUTSIDE_LAYERS)
        config = read_config(Path(model))
        ends = 2 * (config["hidden_size"] + config["vocab_size"])
        planned = shape_of(config).adapters
        layers = planned._replace(whole=planned.whole - ends).slot_bytes(slots, num_gpus=1)
        assert (len(made) > 10, layers) == (True, of_layers), name
        adapted = [made[place] for place in OUTSIDE_LAYERS if place in made]
        assert sum(adapted) in (0, planned.slot_bytes(slots, num_gpus=1) - layers), name


@pytest.mark.feature("LoRA on dense layers")
def test_an_adapter_of_attention(expected: Result, ranks: list[Result]) -> None:
    names = ("base", "dense")
    assert tokens_of(ranks, *names) == tokens_of([expected] * 4, *names)


@pytest.mark.feature("LoRA on experts")
def test_an_adapter_of_experts_and_two_in_one_batch(expected: Result, ranks: list[Result]) -> None:
    names = ("experts", "together")
    assert tokens_of(ranks, *names) == tokens_of([expected] * 4, *names)


@pytest.mark.feature("LoRA loaded while serving")
def test_adapters_come_and_go(expected: Result, ranks: list[Result]) -> None:
    names = ("base, later", "experts, later", "dense, later")
    assert tokens_of(ranks, *names) == tokens_of([expected] * 4, *names)
    assert expected["loaded"] == [[], [1], [1, 2], [2]]
    assert [result["loaded"] for result in ranks] == [expected["loaded"]] * 4
    assert expected["tokens"]["dense, later"] == expected["tokens"]["dense"]


@pytest.mark.feature("LoRA in an offline `LLM` over several ranks (`lora_request`)")
def test_offline_one_adapter_for_a_call_and_one_for_each_prompt(
    stock: StockEngine, checkpoints: Checkpoints, case: dict[str, Any]
) -> None:
    """Whichever rank gets a prompt loads its adapter then."""
    model = checkpoints("qwen3_moe", 8)
    alone = case | {"engine_args": LORA, "drive": "tests.e2e.adapters:each_alone"}
    expected = stock(model, **alone)["tokens"]
    llm = LORA | {"enforce_eager": True, "max_model_len": 512, "max_num_seqs": 1, "seed": 0}
    llm |= {"max_num_batched_tokens": 64, "additional_config": {"dwdp": {"mode": "prefetch"}}}
    asked = json.dumps({"model": model, "adapters": case["adapters"], "llm": llm})
    ended = subprocess.run(
        [sys.executable, "-m", "tests.e2e.adapters", asked],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=ROOT,
        env=os.environ | triton_in_torch.environment() | {"VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-4000:]
    (line,) = [line for line in ended.stdout.splitlines() if line.startswith("FOUND ")]
    found = json.loads(line.removeprefix("FOUND "))
    assert found["tokens"] == expected
    places = [(ADAPTED_PROMPTS.index(text), name) for text, name in found["dealt"]]
    assert {name for _, name in places} == set(expected)
    assert found["mixed"] == [expected[name][place] for place, name in places]
    for status in found["status"]:
        fetched = sum(status["fetched_bytes"].values())
        assert fetched > 20 * status["remote_expert_bytes"] > 0, "a rank has answered nothing"
    *answered, (refused, _) = found["loaded"]
    assert answered == [
        [[True, True], []],
        [True, [1]],
        [True, [1]],
        [2, [1]],  # of adapter 2 only the rank that has answered knows
        [True, [1]],  # it is removed where it was
        [False, [1]],
    ]
    assert "2" in refused[0] and refused[-1] == "This is the answer of DWDP rank 0."


@pytest.mark.slow
@pytest.mark.feature("LoRA loaded while serving")
def test_a_server_loads_and_unloads_adapters_on_all_ranks(
    stock: StockEngine, checkpoints: Checkpoints, case: dict[str, Any], tmp_path: Path
) -> None:
    model, adapters = checkpoints("qwen3_moe", 8), case["adapters"]
    alone = case | {"engine_args": LORA, "drive": "tests.e2e.adapters:each_alone"}
    expected = stock(model, **alone)["tokens"]
    arguments = ["--distributed-executor-backend", "dwdp", "--data-parallel-size", "2"]
    arguments += ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "8", "--enforce-eager"]
    arguments += ["--max-num-batched-tokens", "64", "--max-num-seqs", "1"]
    environment = triton_in_torch.environment() | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with serving(tmp_path / "log", model, *arguments, environment=environment) as server:

        def tokens(name: str, rank: int) -> list[list[int]]:
            options: dict[str, Any] = {"model": name, "rank": rank, "max_tokens": NUM_TOKENS}
            return [server.tokens(prompt, **options) for prompt in ADAPTED_PROMPTS]

        for rank in (0, 1):
            assert tokens("m", rank) == expected["base"]
        for name, path in adapters.items():
            assert refused(lambda name=name: tokens(name, 0)) == 404
            change(server, "load", lora_name=name, lora_path=path)
        for rank in (0, 1):
            assert {name: tokens(name, rank) for name in adapters} | {
                "base": tokens("m", rank)
            } == expected
        change(server, "unload", lora_name="experts")
        assert refused(lambda: tokens("experts", 1)) == 404
        assert tokens("dense", 1) == expected["dense"]


def change(server: Server, action: str, **body: str) -> None:
    urllib.request.urlopen(
        urllib.request.Request(
            f"{server.url}/v1/{action}_lora_adapter",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        ),
        timeout=60,
    ).close()


def refused(ask: Callable[[], object]) -> int:
    """Return the status with which a request is refused."""
    with pytest.raises(urllib.error.HTTPError) as error:
        ask()
    error.value.close()
    return error.value.code
