"""torch tensors over addresses of this process."""

import ctypes
import math

import torch


def tensor_at(address: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A CPU tensor `shape` over memory at `address`, which must outlive it and is not owned.

    Writing through it is the caller's responsibility: composite tensors are mapped read-only.
    """
    num_elements = math.prod(shape)
    buffer = (ctypes.c_char * (num_elements * dtype.itemsize)).from_address(address)
    return torch.frombuffer(buffer, dtype=dtype, count=num_elements).view(shape)
