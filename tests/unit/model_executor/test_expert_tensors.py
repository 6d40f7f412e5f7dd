"""Sorting by layout in memory, and placing tensors over other rows."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_dwdp.errors import DwdpUnsupportedError
from vllm_dwdp.model_executor.expert_tensors import (
    LARGE_ROW_BYTES,
    digest_of,
    expert_dimension,
    sort_tensors,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("tensor", "dimension"),
    [
        (torch.empty(4, 3, 2), 0),
        (torch.empty(4), 0),
        (torch.empty(3, 4).t(), None),  # shape (4, 3), but the experts are innermost
        (torch.empty(4, 6, 5).permute(2, 1, 0), 2),  # CuteDSL keeps such views
        (torch.empty_strided((4, 3, 2), (8, 1, 3)), 0),  # MN-major scales, padded
        (torch.empty(1, 4, 3), 1),  # dimensions of one element have any stride
        (torch.empty(5, 4), None),
        (torch.empty(()), None),
    ],
)
def test_the_outermost_dimension_in_memory_decides(
    tensor: torch.Tensor, dimension: int | None
) -> None:
    assert expert_dimension(tensor, 4) == dimension


def test_one_expert_is_the_first_dimension() -> None:
    assert expert_dimension(torch.empty(1, 5), 1) == 0
    assert expert_dimension(torch.empty(5, 1), 1) is None


@given(st.data())
def test_views_placed_over_a_copy_of_the_rows_read_the_same(data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(2, 5))
    rows, columns = data.draw(st.integers(2, 4)), data.draw(st.integers(2, 4))
    padding, start = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 2))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]))
    row = rows * columns + padding
    memory = torch.randint(0, 99, (start + num_experts * row,)).to(dtype)
    whole = memory.as_strided((num_experts, rows, columns), (row, columns, 1), start)
    views: dict[str, torch.Tensor] = {
        "whole": whole,
        "half": whole[:, rows // 2 :],
        "turned": whole.permute(2, 0, 1),
        "flat": memory[start:],
    }
    sorted_tensors = sort_tensors("layer", views, num_experts, CPU)
    (found,) = sorted_tensors.per_expert
    assert found.name == "whole" and found.row_bytes == row * memory.element_size()
    assert not sorted_tensors.replicated
    moved = torch.zeros(found.num_bytes, dtype=torch.uint8)
    moved[: found.rows.numel()] = found.rows
    for placed in found.tensors:
        assert torch.equal(placed.over(moved), views[placed.path])
        assert placed.over(moved).stride() == views[placed.path].stride()


def test_what_has_no_row_per_expert_is_replicated() -> None:
    tensors = {
        "scale": torch.ones(()),
        "table": torch.ones(6, 3),
        "empty": torch.ones(4, 0),
        "elsewhere": torch.ones(4, device="meta"),
        "rows": torch.ones(4, 2),
    }
    found = sort_tensors("layer", tensors, 4, CPU)
    assert set(found.replicated) == {"scale", "table", "empty", "elsewhere"}
    assert [rows.name for rows in found.per_expert] == ["rows"]


@pytest.mark.parametrize(
    "others",
    [
        lambda memory: {"beyond": memory[12:]},  # outside of the rows
        lambda memory: {"other": memory.as_strided((4, 2), (4, 1))},  # other rows
        lambda memory: {"across": memory.as_strided((4, 3), (3, 1), 1)},  # from row to row
    ],
)
def test_memory_that_is_not_rows_is_refused(others: Any) -> None:
    memory = torch.ones(4 * LARGE_ROW_BYTES)
    tensors = {"rows": memory[:12].view(4, 3)} | others(memory)
    with pytest.raises(DwdpUnsupportedError, match=r"one row per expert: rows \(4, 3\) \(3, 1\), "):
        sort_tensors("layer", tensors, 4, CPU)


@pytest.mark.parametrize("line", [0, 1])
def test_a_line_of_a_small_table_is_replicated_with_the_table(line: int) -> None:
    """ERNIE-4.5-VL has one such table of biases for text experts and vision experts."""
    table = torch.nn.Parameter(torch.rand(2, 4))
    bias = table[line]
    found = sort_tensors(
        "layer", {"bias": bias, "bias._base": table, "w": torch.ones(4, 2)}, 4, CPU
    )
    assert set(found.replicated) == {"bias", "bias._base"}
    assert [rows.name for rows in found.per_expert] == ["w"]


def test_a_digest_is_of_the_elements() -> None:
    tensor = torch.arange(6.0).view(2, 3)
    assert digest_of(tensor) == digest_of(tensor.t().contiguous().t())
    assert digest_of(tensor) != digest_of(tensor + 1)
    assert digest_of(torch.ones(3, dtype=torch.float8_e4m3fn))
