"""Moves a layer's tensors to other memory, and proves that no object kept the old.

A tensor object stays the same for all who hold it; what changes is the memory behind it. So parameters,
aliases and what kernels and their configs captured follow together.
"""

import gc
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from vllm_dwdp.errors import DwdpUnsupportedError
from vllm_dwdp.model_executor.expert_tensors import TensorOverRows


@dataclass(frozen=True)
class WatchedStorage:
    """A storage that must be gone once its tensors have been moved.

    Args:
        name: of a tensor over it.
        storage: seen without being kept.
        address: of its first byte.
    """

    name: str
    storage: StorageWeakRef
    address: int

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> "WatchedStorage":
        """Return the storage behind `tensor`."""
        storage = tensor.untyped_storage()
        return cls(name, StorageWeakRef(storage), storage.data_ptr())


def detach(tensors: Iterable[TensorOverRows]) -> None:
    """Leave the tensors without memory, until they are moved over some."""
    for placed in tensors:
        placed.tensor.data = torch.empty(0, dtype=placed.dtype, device=placed.tensor.device)


def check_gone(layer_name: str, watched: Sequence[WatchedStorage]) -> None:
    """Prove that memory which the layer's tensors have left is free.

    Raises:
        DwdpUnsupportedError: something still holds it, and would compute with one rank's experts.
    """
    if all(each.storage.expired() for each in watched):
        return
    gc.collect()
    for kept in watched:
        if not kept.storage.expired():
            raise DwdpUnsupportedError(
                f"{layer_name}: {kept.name} was processed, but {_holders(kept.address)} keeps its "
                "memory, so the kernel would not see the experts of other ranks. Use dwdp mode "
                '"replica" for this checkpoint, and report its quantisation method.'
            )


def _holders(address: int) -> str:
    """Who holds a storage, as far as Python knows."""
    tensors = [found for found in gc.get_objects() if _lies_at(found, address)]
    names = {
        type(holder).__name__
        for tensor in tensors
        for referrer in gc.get_referrers(tensor)
        for holder in (_owner_of(referrer),)
        if referrer is not tensors
    }
    return ", ".join(sorted(names)) or "something outside of Python"


def _lies_at(found: object, address: int) -> bool:
    """Whether `found` is a tensor over the storage at `address`."""
    if not issubclass(
        type(found), torch.Tensor
    ):  # `isinstance` asks for `__class__`, which some raise on
        return False
    with suppress(RuntimeError, NotImplementedError):  # a tensor without a storage of its own
        return bool(found.untyped_storage().data_ptr() == address)  # type: ignore[attr-defined]
    return False


def _owner_of(referrer: object) -> object:
    """Return the object whose attributes `referrer` is, if there is one."""
    if isinstance(referrer, dict):
        for owner in gc.get_referrers(referrer):
            if getattr(owner, "__dict__", None) is referrer:
                return owner
    return referrer
