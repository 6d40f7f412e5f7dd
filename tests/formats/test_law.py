"""Every quantisation method with every kernel that vLLM has for it: whole against shared.

What is vLLM's stays vLLM's (layers, raw parameters, their processing); only operations that need a GPU
are replaced (`operations.py`). It is no evidence about a GPU's kernels.
"""

import importlib
import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.compat.versions import vllm_minor
from tests.e2e.test_formats import RUNS_HERE
from tests.formats import law, table
from tests.formats.layers import LAYERS, Choice, make_layer, oracle_modules, subclasses
from tests.formats.methods import METHODS, NOT_BUILT, NOT_BUILT_SINCE
from tests.formats.pairs import pairs_of
from tests.formats.table import Row
from tests.helpers.engines import ROOT
from vllm_dwdp.compat.worker.moe import check_method
from vllm_dwdp.errors import DwdpUnsupportedError
from vllm_dwdp.model_executor.twin import check_same

pytestmark = pytest.mark.compat

DOCUMENT = ROOT / "docs" / "formats.md"
NEEDS_AITER = {"ct_mxfp4_fp8", "gpt_oss_mxfp4", "mxfp4", "quark_gpt_oss_mxfp4"}
"""Methods one of whose kernels has its scales shuffled by a package for AMD GPUs, since 0.33."""
OF_THE_FIRST_VERSION = pytest.mark.skipif(
    vllm_minor() >= (0, 33), reason="docs/formats.md and its exceptions are those of vLLM 0.32"
)
FOUND: dict[str, list[Row]] = {}
"""Rows by method, for the table that is printed."""


@pytest.mark.parametrize("method", METHODS)
def test_experts_can_be_shared(method: str) -> None:
    if method in NEEDS_AITER and vllm_minor() >= (0, 33):
        pytest.skip("since 0.33 a kernel for AMD GPUs needs the package aiter")
    rows = FOUND.setdefault(method, list(table.rows_of(method)))
    assert rows
    print("\n".join(map(str, rows)))
    broken = [str(row) for row in rows if row.verdict == table.BROKEN]
    assert not broken, broken
    assert any(row.verdict in (table.HOLDS, table.REFUSED_HERE) for row in rows), (
        f"{method}: nothing tried"
    )


def test_every_method_of_vllm_is_tried_or_named() -> None:
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

    built = {method_class(method) for method in METHODS}
    found = {
        kind.__name__
        for kind in subclasses(FusedMoEMethodBase)
        if kind.__module__.startswith(f"{LAYERS}.quantization.")
    }
    later = {
        name for first, names in NOT_BUILT_SINCE.items() for name in names if vllm_minor() >= first
    }
    named = set(NOT_BUILT) | later
    assert found - built - named == set(), "of this vLLM, and neither tried nor named"
    assert named - found == set(), "not of this vLLM"
    assert not built & named


def method_class(method: str) -> str:
    """Return the class of vLLM's that a key of `METHODS` leads to."""
    with law.processing(None, law.BLACKWELL):
        choice = next(pair.choice for pair in pairs_of(method) if pair.choice)
    with law.processing(choice, law.BLACKWELL):
        return type(make_layer(method).quant_method).__name__


@OF_THE_FIRST_VERSION
def test_the_exceptions_are_still_needed() -> None:
    """Of all tables: a pair that is named is found, and needs it."""
    rows = [row for method in METHODS for row in FOUND.get(method) or table.rows_of(method)]
    verdicts = {(row.method, row.backend): row.verdict for row in rows}
    assert all(verdicts[pair] == table.REFUSED_HERE for pair in table.DEPENDENT)
    assert all(verdicts[pair] == table.LEFT_OUT for pair in table.UNTRIED)
    refused = {(row.method, row.backend) for row in rows if row.verdict == table.REFUSED}
    assert refused == table.REFUSALS


# --- what is refused: NVFP4 on Marlin --------------------------------------------------------------


@pytest.mark.parametrize("method", sorted({method for method, _ in table.DEPENDENT}))
def test_nvfp4_on_marlin_is_refused_before_it_is_loaded_and_its_twin_would_find_it(
    method: str,
) -> None:
    kernels = importlib.import_module(f"{LAYERS}.fused_moe.experts.marlin_moe")
    backend = oracle_modules()["nvfp4"].NvFp4MoeBackend.MARLIN
    choice = Choice(oracle="nvfp4", backend=backend, experts=kernels.MarlinExperts)
    with law.processing(choice, law.HOPPER):
        with pytest.raises(
            DwdpUnsupportedError, match=r"depends on all of them, on Marlin.*replica"
        ):
            check_method(make_layer(method))
        part = law.process(method, law.RANKS[0], 4096)
    assert part.twin is not None
    with pytest.raises(
        DwdpUnsupportedError, match="scale depends on experts that other ranks hold"
    ):
        check_same(method, part.twin, part.look().independent_of_others(law.RANKS[0]))


# --- the test can fail -----------------------------------------------------------------------------


def broken_by(method: str, large_bytes: int, change: Any = None) -> str:
    """Find what breaks if raw rows from this size on are zero and `change` is made to each layer."""
    kernels = importlib.import_module(f"{LAYERS}.fused_moe.experts.triton_moe")
    backend = oracle_modules()["fp8"].Fp8MoeBackend.TRITON
    choice = Choice(oracle="fp8", backend=backend, experts=kernels.TritonExperts)
    with law.processing(choice, law.HOPPER):
        layers = [
            law.process(method),
            *(law.process(method, rank, large_bytes) for rank in law.RANKS),
        ]
    for processed in layers:
        if change is not None:
            change(processed.layer)
    whole, *parts = (replace(processed, twin=None) for processed in layers)
    with pytest.raises(law.Broken) as error:
        law.compare(whole, parts)
    return str(error.value)


def test_a_small_parameter_that_is_not_complete_is_found() -> None:
    assert "input_scale" in broken_by("fp8_tensor_static", large_bytes=4)


def test_a_reduction_over_experts_of_a_large_parameter_is_found() -> None:
    def reduce(layer: Any) -> None:
        layer.greatest = layer.w13_weight.float().amax()

    assert "greatest" in broken_by("fp8_block", 4096, reduce)


def test_experts_that_are_not_outermost_in_memory_are_found() -> None:
    def transpose(layer: Any) -> None:
        layer.columns = layer.w2_weight.transpose(0, 1).contiguous().transpose(0, 1)

    assert "columns" in broken_by("fp8_block", 4096, transpose)


def test_rows_that_need_other_ranks_are_found() -> None:
    def mix(layer: Any) -> None:
        layer.mixed = layer.w2_weight.float() + layer.w2_weight.float().roll(1, dims=0)

    assert "mixed" in broken_by("fp8_block", 4096, mix)


def test_numbers_that_differ_are_found() -> None:
    def keep(layer: Any) -> None:
        layer.factor = float(layer.w13_weight.float().amax())

    assert "factor" in broken_by("fp8_block", 4096, keep)


def test_tensors_that_only_some_ranks_have_are_found() -> None:
    count = iter(range(9))

    def add_one(layer: Any) -> None:
        setattr(layer, f"of_{next(count)}", torch.zeros(1))

    assert "of_0" in broken_by("fp8_block", 4096, add_one)


def test_memory_that_a_kernel_keeps_is_found() -> None:
    kept = []

    def keep(layer: Any) -> None:
        kept.append(layer.w2_weight.data)

    assert "w2_weight was processed, but list keeps" in broken_by("fp8_block", 4096, keep)


# --- the documentation's table ---------------------------------------------------------------------


@OF_THE_FIRST_VERSION
def test_the_documentation_is_what_the_tests_found() -> None:
    rows = [row for method in METHODS for row in FOUND.get(method) or table.rows_of(method)]
    shown = "two ranks that read in place, three that prefetch, one that returns; seven experts"
    text = table.as_markdown(rows, dict.fromkeys(RUNS_HERE, shown))
    if os.environ.get("DWDP_WRITE_FORMATS"):
        DOCUMENT.write_text(text)
    assert DOCUMENT.read_text() == text, "write it anew: docs/formats.md says how"


def test_the_documentation_says_of_every_pair_what_was_found() -> None:
    def row(backend: str, verdict: str, says: str) -> Row:
        return Row(method="gptq", backend=backend, kernel="Kernel", verdict=verdict, says=says)

    rows = [
        row("MARLIN", table.HOLDS, "4 by expert, 2 the same"),
        row("XPU", table.LEFT_OUT, "for Intel GPUs only"),
        row("CUTLASS", table.REFUSED, "Unsupported. And more"),
    ]
    text = table.as_markdown(rows, {"gptq": "two and three ranks"})
    for line in (
        "| gptq | two and three ranks |",
        "| gptq | MARLIN | Kernel | 4 by expert, 2 the same |",
        "| for Intel GPUs only | gptq on XPU |",
        "| Unsupported | gptq on CUTLASS |",
    ):
        assert line in text.splitlines()
