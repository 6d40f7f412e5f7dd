"""Checkpoints as they are published, run by vLLM's own quantised kernels (`tests.helpers.cpu_gates`)."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from gpu_checks.checkpoints import ARCHITECTURES
from gpu_checks.fake import fake_cuda_environment
from gpu_checks.quantised import SHAPE, make_quantised_checkpoint
from tests.e2e.conftest import StockEngine
from tests.e2e.matrix import run_cases
from tests.e2e.test_kill_points import run_lives
from tests.e2e.test_simulated_cuda import SIMULATED
from tests.helpers import cpu_gates

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.every_version,
    pytest.mark.skipif(cpu_gates.why_not() is not None, reason=str(cpu_gates.why_not())),
]

RUNS_HERE = (
    "bf16_fused",
    "fp8_block",
    "ct_int8",
    "ct_int4",
    "gptq",
    "awq",
    "gpt_oss_mxfp4",
)
"""Formats for which vLLM 0.32 has a kernel that this processor runs."""
NUM_EXPERTS = 7
"""Which neither two nor three ranks divide."""
LARGE = {"hidden_size": 512, "moe_intermediate_size": 1408, "num_hidden_layers": 3}
GATES = {"prepare": "tests.helpers.cpu_gates:open_gates"}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Checkpoints by format."""
    folder = tmp_path_factory.mktemp("published")
    return {
        name: str(make_quantised_checkpoint(folder / name, name, NUM_EXPERTS)) for name in RUNS_HERE
    }


@pytest.fixture(scope="module")
def references(published: dict[str, str], stock: StockEngine) -> dict[str, dict[str, Any]]:
    """Return what stock vLLM answers, by format."""
    results = stock.all(list(published.values()), **GATES)
    return {name: results[model] for name, model in published.items()}


def test_stock_vllm_reads_every_format(references: dict[str, dict[str, Any]]) -> None:
    for name, result in references.items():
        assert len({token for tokens in result["tokens"] for token in tokens}) > 20, name
    # The same codes in two packings are the same model; another format is another rounding of it.
    tokens = {name: result["tokens"] for name, result in references.items()}
    assert tokens["ct_int4"] == tokens["gptq"]
    others = [tokens[name] for name in ("bf16_fused", "fp8_block", "ct_int8", "gptq", "awq")]
    assert all(one != other for number, one in enumerate(others) for other in others[:number])
    assert len({str(result["weights"]) for result in references.values()}) == len(RUNS_HERE)


def check(ranks: list[dict[str, Any]], reference: dict[str, Any]) -> None:
    """Check that a case's ranks hold and answer what the stock engine does, and read remote bytes."""
    for result in ranks:
        where = (result["name"], result["rank"])
        assert result["weights"] == reference["weights"], where
        assert result["tokens"] == reference["tokens"], where
        assert result["status"]["remote_expert_bytes"] > 0, where


COPIED = ("fp8_block", "gpt_oss_mxfp4")
"""On every push: an expert's tensors one by one, and fused; two kinds of scale."""
OTHERS = tuple(name for name in RUNS_HERE if name not in COPIED)
ROWS = {
    "bf16_fused": "experts fused in bf16",
    "fp8_block": "FP8 in blocks",
    "ct_int8": "compressed-tensors int8",
    "ct_int4": "compressed-tensors int4",
    "gptq": "GPTQ int4",
    "awq": "AWQ int4",
    "gpt_oss_mxfp4": "MXFP4 of gpt-oss",
}


def rows_of_formats(names: Sequence[str]) -> pytest.MarkDecorator:
    """Return a row for each format."""
    return pytest.mark.feature(*(f"Checkpoint format: {ROWS[name]}" for name in names))


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "names",
    [
        pytest.param(COPIED, id="two-formats", marks=rows_of_formats(COPIED)),
        pytest.param(OTHERS, id="other-formats", marks=[pytest.mark.slow, rows_of_formats(OTHERS)]),
    ],
)
class TestShared:
    """Ranks that share the experts answer and hold what one stock engine does, in every format."""

    def test_two_and_three_ranks(
        self,
        published: dict[str, str],
        references: dict[str, dict[str, Any]],
        tmp_path: Path,
        names: tuple[str, ...],
    ) -> None:
        listed = [
            GATES
            | {"name": f"{name}@{num_ranks}-{mode}", "model": published[name]}
            | {"num_ranks": num_ranks, "dwdp": {"mode": mode}}
            for num_ranks, mode in ((2, "direct"), (3, "prefetch"))
            for name in names
        ]
        races = {"DWDP_DEBUG_POISON": "1", "DWDP_DEBUG_MAX_DELAY_US": "1000"}
        for case, ranks in run_cases(tmp_path, "formats", listed, races).items():
            check(ranks, references[case.partition("@")[0]])
            for result in ranks:
                where, status = (case, result["rank"]), result["status"]
                resident = len(range(result["rank"], NUM_EXPERTS, len(ranks)))
                assert status["read_share"] == pytest.approx(resident / NUM_EXPERTS), where
                if status["mode"] == "prefetch":
                    fetched = sum(status["fetched_bytes"].values())
                    assert fetched > 0.9 * status["remote_expert_bytes"], where

    def test_a_rank_returns(
        self,
        published: dict[str, str],
        references: dict[str, dict[str, Any]],
        tmp_path: Path,
        names: tuple[str, ...],
    ) -> None:
        found, _ = run_lives("returns", tmp_path, *(published[name] for name in names))
        for name in names:
            lives, expected = found[published[name]], references[name]["tokens"][:2]
            returned, survivor = lives["returned"], lives["survivor"]
            assert lives["code"] == -9, (name, lives)
            assert returned["tokens"] == survivor["tokens"] == expected, name
            assert survivor["num_different"] == 0 and survivor["num_rounds"] > 0, name
            assert returned["status"]["adopted"] and returned["status"]["read_share"] == 0, name
            for life in (returned, survivor):
                assert not any(life["left"].values()), (name, life)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_experts_that_are_stored_more_than_once(
    published: dict[str, str], references: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    redundant = {"num_ranks": 3, "dwdp": {"mode": "prefetch", "experts_per_rank": 4}}
    listed = [GATES | redundant | {"name": name, "model": published[name]} for name in RUNS_HERE]
    for name, ranks in run_cases(tmp_path, "redundant", listed).items():
        check(ranks, references[name])
        assert {rank["status"]["read_share"] for rank in ranks} == {4 / NUM_EXPERTS}, name


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_both_views_and_the_switch_between_them(stock: StockEngine, tmp_path: Path) -> None:
    """Over the simulated CUDA device, whose pages need larger experts."""
    model = str(make_quantised_checkpoint(tmp_path / "large", "fp8_block", NUM_EXPERTS, **LARGE))
    case = GATES | SIMULATED | {"name": "auto", "model": model, "num_ranks": 3}
    case["dwdp"] = {"mode": "auto", "direct_max_tokens": 8}
    environment = fake_cuda_environment() | {"DWDP_DEBUG_POISON": "1"}
    (ranks,) = run_cases(tmp_path, "views", [case], environment).values()
    check(ranks, stock(model, **GATES))
    for result in ranks:
        assert min(result["status"]["steps"].values()) > 2, result["status"]["steps"]
        assert sum(result["status"]["fetched_bytes"].values()) > 0


def test_fused_experts_are_what_transformers_writes(
    published: dict[str, str], tmp_path: Path
) -> None:
    """Newer versions keep all experts of a layer in one tensor; the older format is their default."""
    import transformers

    config = ARCHITECTURES["qwen3_moe"](NUM_EXPERTS)
    for key, value in SHAPE.items():
        setattr(config, key, value)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path, save_original_format=False)
    written, ours = (
        {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        for file in (
            safe_open(Path(folder) / "model.safetensors", "pt")
            for folder in (tmp_path, published["bf16_fused"])
        )
    )
    assert ours == written
    assert any(name.endswith("experts.gate_up_proj") for name in ours)


def test_gates_open_in_every_process_of_a_started_program() -> None:
    """vLLM loads the plugin of `cpu_gates.environment` where it loads ours."""
    script = (
        "from vllm.plugins import load_general_plugins; load_general_plugins()\n"
        "from tests.helpers.cpu_gates import GATED\n"
        "from vllm.model_executor.layers.fused_moe.experts import cpu_moe\n"
        "print([getattr(cpu_moe, name)._supports_current_device() for name in GATED])"
    )
    said = []
    for environment in ({}, cpu_gates.environment()):
        ended = subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | environment,
            cwd=cpu_gates.ROOT,
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        said.append(ended.stdout.splitlines()[-1])
    assert said == [str([torch.cpu._is_amx_tile_supported()] * 4), str([True] * 4)]
