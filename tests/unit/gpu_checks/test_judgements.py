"""What GPU checks conclude from right and wrong numbers; and the kernel that no CPU can compile."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpu_checks.kv_sizing import MIB, SHARING, check_sizing
from gpu_checks.returning import check_memory

ROOT = Path(__file__).parents[3]


def made_up_sizes(*, sees_experts: bool) -> dict[str, list[dict[str, int]]]:
    """Return what a vLLM that sees shards and slots would find, or one that does not, in MiB."""
    found = {}
    for name, dwdp in SHARING.items():
        shard = 768 * dwdp.get("experts_per_rank", 4) // 4
        slots = 192 if dwdp["mode"] == "prefetch" else 0
        own = 600 + (shard + slots if sees_experts else 0)
        consumed, budget, free = 2 * own, 12_000, 70_000
        cache = budget - consumed - 100
        each = {"free_at_start": free, "budget": budget, "consumed": consumed, "cache": cache}
        each |= {"shard": shard, "slots": slots, "free": free - 2 * (600 + shard + slots + cache)}
        found[name] = [{key: value * MIB for key, value in each.items()}] * 2
    return found


def test_kv_sizing_that_misses_experts_is_found() -> None:
    check_sizing(made_up_sizes(sees_experts=True))
    with pytest.raises(AssertionError, match="vLLM missed experts"):
        check_sizing(made_up_sizes(sees_experts=False))
    sizes = made_up_sizes(sees_experts=True)
    sizes["prefetch"] = [each | {"cache": each["cache"] + 300 * MIB} for each in sizes["prefetch"]]
    with pytest.raises(AssertionError, match="prefetch"):
        check_sizing(sizes)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, ""),
        ({"budget": 5000}, "not counted"),
        ({"wanted": 4900}, "proves nothing"),
        ({"torch_peak_loading": 900}, "held twice"),
        ({"free_when_loaded": 4000}, "loading took"),
    ],
)
def test_a_shard_that_is_held_twice_is_found(wrong: dict[str, int], message: str) -> None:
    good = {"wanted": 5380, "free_at_start": 5000, "budget": 4612, "torch_peak_loading": 200}
    good |= {"free_when_loaded": 4700}
    memory = {key: value * MIB for key, value in (good | wrong).items()}
    if not message:
        check_memory(memory, 768 * MIB, 192 * MIB)
        return
    with pytest.raises(AssertionError, match=message):
        check_memory(memory, 768 * MIB, 192 * MIB)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_gather_kernel_compiles_for_hopper_with_wide_accesses(tmp_path: Path) -> None:
    program = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gpu_checks.expert_gather import _gather_chunks

source = ASTSource(
    fn=_gather_chunks,
    signature={
        "anchor": "*i32",
        "chunks": "*i64",
        "routed": "*i32",
        "CHUNK_WORDS": "constexpr",
        "BLOCK": "constexpr",
    },
    constexprs={"CHUNK_WORDS": 16384, "BLOCK": 2048},
    attrs={(argument,): [["tt.divisibility", 16]] for argument in range(3)},
)
ptx = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"]
assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx, ptx
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
