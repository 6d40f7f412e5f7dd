"""torch tensors over addresses that torch did not allocate."""

import math

import torch


def tensor_at(
    address: int, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> torch.Tensor:
    """Return a contiguous tensor over memory at `address`, which is not owned and must outlive it.

    The device is given, not asked of the driver: the first page of a composite tensor may be a
    peer's. Writing through it is the caller's responsibility.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    storage = torch._C._construct_storage_from_data_pointer(address, device, num_bytes)
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return torch.empty(0, dtype=dtype, device=device).set_(storage, 0, shape, strides)
