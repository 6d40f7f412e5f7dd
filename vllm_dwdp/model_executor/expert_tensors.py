"""Sorts the tensors of a processed layer by what they are, not by their names.

A tensor whose outermost dimension in memory counts the experts is *per expert*: row `e` is taken from
the rank that loaded expert `e`. Everything else is *replicated*: each rank has made it itself, and all
must have made the same. Tensors that share a storage (aliases, views, kernel copies of a parameter) are
moved together, so none is left behind over memory of one rank only. A small storage that has more than
rows, as a table of which each of two layers holds a line, is replicated.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from vllm_dwdp.errors import DwdpUnsupportedError
from vllm_dwdp.layout.placement import ExpertRange

LARGE_ROW_BYTES = 4096
"""From so many bytes per expert on, a parameter is kept and read for resident experts only."""


@dataclass(frozen=True, kw_only=True)
class TensorOverRows:
    """A tensor that lies within the rows of a storage, and where.

    Args:
        path: by which the layer holds it.
        tensor: the object itself, which every holder shares.
        dtype: of its elements.
        offset: first element, counted from row 0 of the storage.
        shape: of the tensor.
        stride: in elements.
    """

    path: str
    tensor: torch.Tensor = field(repr=False)
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def over(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the same tensor over other rows.

        Args:
            rows: their bytes, from row 0 on; uint8 of shape (bytes,).
        """
        place = torch.empty(0, dtype=self.dtype, device=rows.device)
        return place.set_(rows.untyped_storage(), self.offset, self.shape, self.stride)


@dataclass(frozen=True, kw_only=True)
class ExpertRows:
    """A storage of one row per expert, and every tensor over it.

    Args:
        name: path of the first of its tensors.
        num_experts: rows.
        row_bytes: of one expert.
        rows: all rows as bytes, as far as the storage goes; it keeps the storage.
        tensors: over it, in the order in which they were met.
    """

    name: str
    num_experts: int
    row_bytes: int
    rows: torch.Tensor = field(repr=False)
    tensors: tuple[TensorOverRows, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows."""
        return self.num_experts * self.row_bytes

    def bytes_of(self, experts: ExpertRange) -> torch.Tensor:
        """Return the bytes of some rows, uint8 of shape (rows * `row_bytes`,).

        There are fewer where the storage ends within the last row.
        """
        return self.rows[experts.start * self.row_bytes : experts.stop * self.row_bytes]


@dataclass(frozen=True, kw_only=True)
class SortedTensors:
    """The tensors of one layer.

    Args:
        per_expert: storages of one row per expert.
        replicated: other tensors, by path.
    """

    per_expert: tuple[ExpertRows, ...]
    replicated: dict[str, torch.Tensor]


def sort_tensors(
    layer_name: str,
    tensors: dict[str, torch.Tensor],
    num_experts: int,
    device: torch.device,
) -> SortedTensors:
    """Sort the tensors of a processed layer of `num_experts` experts.

    Args:
        tensors: by path, aliases included once.
        device: of the experts; what lies elsewhere is replicated.

    Raises:
        DwdpUnsupportedError: a large storage mixes rows of experts with something else.
    """
    groups: dict[int, list[tuple[str, torch.Tensor]]] = {}
    replicated = {}
    for path, tensor in tensors.items():
        if tensor.numel() and tensor.device.type == device.type and tensor.layout is torch.strided:
            groups.setdefault(tensor.untyped_storage().data_ptr(), []).append((path, tensor))
        else:
            replicated[path] = tensor
    per_expert = []
    for members in groups.values():
        row_bytes = {expert_stride_bytes(tensor, num_experts) for _, tensor in members} - {None}
        (stride,) = row_bytes if len(row_bytes) == 1 else (0,)
        rows = _rows_of(members, num_experts, stride) if stride else None
        if rows is not None:
            per_expert.append(rows)
        elif not row_bytes or _is_small(members, num_experts):
            replicated.update(members)  # every rank has loaded it whole
        else:
            shown = ", ".join(f"{path} {tuple(t.shape)} {t.stride()}" for path, t in members)
            raise DwdpUnsupportedError(
                f"{layer_name}: tensors that share memory do not have one row per expert: {shown}. "
                'Use dwdp mode "replica" for this checkpoint.'
            )
    return SortedTensors(per_expert=tuple(per_expert), replicated=replicated)


def expert_stride_bytes(tensor: torch.Tensor, num_experts: int) -> int | None:
    """Bytes from expert to expert, if the outermost dimension in memory counts the experts."""
    dimension = expert_dimension(tensor, num_experts)
    return None if dimension is None else tensor.stride(dimension) * tensor.element_size()


def expert_dimension(tensor: torch.Tensor, num_experts: int) -> int | None:
    """Return the dimension of the largest stride, if it counts the experts."""
    sized = [axis for axis in range(tensor.dim()) if tensor.shape[axis] > 1]
    if num_experts == 1:
        return 0 if tensor.dim() and tensor.shape[0] == 1 else None
    if not sized:
        return None
    outermost = max(sized, key=tensor.stride)
    return outermost if tensor.shape[outermost] == num_experts else None


def _is_small(members: Sequence[tuple[str, torch.Tensor]], num_experts: int) -> bool:
    """Whether the storage has so few bytes that what it holds was loaded for every expert."""
    _, first = members[0]
    num_bytes: int = first.untyped_storage().nbytes()
    return num_bytes < num_experts * LARGE_ROW_BYTES


def _rows_of(
    members: Sequence[tuple[str, torch.Tensor]], num_experts: int, row_bytes: int
) -> ExpertRows | None:
    """Return the storage of some tensors as rows of experts; None if it is not."""
    name, first = members[0]
    start = min(
        tensor.storage_offset() * tensor.element_size()
        for _, tensor in members
        if expert_stride_bytes(tensor, num_experts) is not None
    )
    if not all(_fits(tensor, num_experts, row_bytes, start) for _, tensor in members):
        return None
    storage = first.untyped_storage()
    num_bytes = min(num_experts * row_bytes, storage.nbytes() - start)
    whole = torch.empty(0, dtype=torch.uint8, device=first.device)
    return ExpertRows(
        name=name,
        num_experts=num_experts,
        row_bytes=row_bytes,
        rows=whole.set_(storage, start, (num_bytes,), (1,)),
        tensors=tuple(
            TensorOverRows(
                path=path,
                tensor=tensor,
                dtype=tensor.dtype,
                offset=tensor.storage_offset() - start // tensor.element_size(),
                shape=tuple(tensor.shape),
                stride=tensor.stride(),
            )
            for path, tensor in members
        ),
    )


def _fits(tensor: torch.Tensor, num_experts: int, row_bytes: int, start: int) -> bool:
    """Whether the tensor stays within the rows, and within each row if it counts the experts."""
    size = tensor.element_size()
    begin = tensor.storage_offset() * size - start
    spans = [
        (length - 1) * step for length, step in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    dimension = expert_dimension(tensor, num_experts)
    if begin < 0 or start % size:
        return False
    if dimension is None:
        return bool(begin + (sum(spans) + 1) * size <= num_experts * row_bytes)
    return bool(begin + (sum(spans) - spans[dimension] + 1) * size <= row_bytes)


def digest_of(tensor: torch.Tensor) -> str:
    """Return a short digest of a tensor's elements, whatever its layout."""
    content = tensor.detach().cpu().contiguous().view(-1)
    return hashlib.sha256(content.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def describe(tensor: torch.Tensor) -> str:
    """Return the type and the layout of a tensor, as ranks compare it."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype} {list(tensor.shape)} strides {list(tensor.stride())}"
