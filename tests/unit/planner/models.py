"""Models, traffic and machines that the planner's tests plan with."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_dwdp.paper import DEEPSEEK_R1, GPT_OSS_120B
from vllm_dwdp.paper.factors import roofline_model
from vllm_dwdp.planner.cost import CostModel
from vllm_dwdp.planner.estimates import Tokens, break_even_tokens
from vllm_dwdp.planner.traffic import Traffic


def config(name: str) -> dict[str, Any]:
    """Read the fields of a published config.json that matter here."""
    path = Path(__file__).with_name("configs") / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text())
    return found


DEEPSEEK_V4_FLASH = config("deepseek_v4_flash")
QWEN3_30B, MIXTRAL_8X7B, GLM_4_5 = config("qwen3_30b"), config("mixtral_8x7b"), config("glm_4_5")
LLAMA4_MAVERICK, LLAMA4_MAVERICK_FP8 = config("llama4_maverick"), config("llama4_maverick_fp8")
ALL = (DEEPSEEK_R1, QWEN3_30B, GPT_OSS_120B, MIXTRAL_8X7B, LLAMA4_MAVERICK, GLM_4_5)

TRAFFIC = Traffic(
    input_tokens=8192, output_tokens=1, variation=0.2, max_num_batched_tokens=32768, batch_size=64
)


def tokens_of(found: Tokens) -> int:
    assert found.number is not None, found.instead
    return found.number


def break_even(model: CostModel, input_tokens: int = 8192) -> int:
    return tokens_of(break_even_tokens(model, input_tokens))


def r1_on_gb200(**changes: Any) -> CostModel:
    """DeepSeek-R1 in NVFP4 on four GB200, at the plain roofline."""
    return replace(roofline_model(), **changes)


def run_plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `vllm-dwdp plan`, which may fail."""
    return subprocess.run(
        [sys.executable, "-m", "vllm_dwdp.entrypoints.cli.main", "plan", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"COLUMNS": "160"},
    )
