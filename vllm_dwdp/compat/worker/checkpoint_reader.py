"""vLLM's checkpoint reader: nothing of an expert is read before the loader asks for it.

safetensors has the kernel read a tensor when it is handed out. A rank keeps its share of the experts,
and of a fused tensor some rows only; so expert tensors are handed out as views of the mapped file, and
what is never copied is never read. Other formats and strategies (`eager`, `.bin` files, streamers) read
files whole, as in stock vLLM.

Private names used: `weight_utils.safe_open`, `DefaultModelLoader.get_all_weights`,
`dummy_loader.initialize_single_dummy_weight`, `BaseModelLoader.load_model`, `.create_model`.
"""

import functools
import json
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vllm_dwdp.compat.worker.attributes import replaced

NamedTensor = tuple[str, torch.Tensor]

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
"""Types of experts as the file format names them; what has another one is read as ever."""

_HEADER_LENGTH = struct.Struct("<Q")


class MappedSafetensors:
    """A safetensors file whose expert tensors are views of the mapped file; the others are read.

    Args:
        stock: safetensors' own, opened on the same file.
        path: of the file.
    """

    def __init__(self, stock: Any, path: str) -> None:
        self._stock = stock
        with open(path, "rb") as file:
            (length,) = _HEADER_LENGTH.unpack(file.read(_HEADER_LENGTH.size))
            self._header = json.loads(file.read(length))
            self._data_start = _HEADER_LENGTH.size + length
            num_bytes = file.seek(0, 2)
        # Private: what a loader writes into a tensor does not reach the file.
        self._file = torch.from_file(path, shared=False, size=num_bytes, dtype=torch.uint8)

    def __enter__(self) -> "MappedSafetensors":
        self._stock.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stock.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)

    def get_tensor(self, name: str) -> torch.Tensor:
        """Return the tensor; an expert's is not read yet."""
        start, stop = (self._data_start + at for at in self._header[name]["data_offsets"])
        shape = self._header[name]["shape"]
        dtype = DTYPES.get(self._header[name]["dtype"])
        if ".experts." in name and dtype is not None and start % dtype.itemsize == 0:
            return self._file[start:stop].view(dtype).view(shape)
        tensor: torch.Tensor = self._stock.get_tensor(name)
        return tensor


@contextmanager
def mapped_experts() -> Iterator[None]:
    """While active, vLLM's default reader hands expert tensors out unread."""
    from vllm.model_executor.model_loader import weight_utils

    stock = weight_utils.safe_open

    def safe_open(path: Any, *args: Any, **kwargs: Any) -> MappedSafetensors:
        return MappedSafetensors(stock(path, *args, **kwargs), str(path))

    with replaced(weight_utils, safe_open=safe_open):
        yield


@contextmanager
def split_experts(wanted: Callable[[], bool]) -> Iterator[None]:
    """While active, fused expert tensors reach the model expert by expert if they are `wanted` so.

    Args:
        wanted: asked once the layers exist.
    """
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    stock = DefaultModelLoader.get_all_weights

    def get_all_weights(self: Any, *args: Any, **kwargs: Any) -> Iterator[NamedTensor]:
        weights = stock(self, *args, **kwargs)
        return _split(weights) if wanted() else weights

    with replaced(DefaultModelLoader, get_all_weights=get_all_weights):
        yield


def _split(weights: Iterator[NamedTensor]) -> Iterator[NamedTensor]:
    for name, tensor in weights:
        prefix, separator, parameter = name.partition(".experts.")
        if not separator or parameter.split(".")[0].isdigit():
            yield name, tensor
            continue
        for expert, row in enumerate(tensor):
            yield f"{prefix}.experts.{expert}.{parameter}", row


@contextmanager
def dummy_weights(
    fill: Callable[[torch.Tensor, Callable[[torch.Tensor], None]], bool],
) -> Iterator[None]:
    """While active, `--load-format dummy` asks `fill` for each tensor before it fills it.

    Args:
        fill: called with a tensor and with what fills one as vLLM does; tells whether it filled it.
    """
    from vllm.model_executor.model_loader import dummy_loader

    stock = dummy_loader.initialize_single_dummy_weight

    def initialize_single_dummy_weight(param: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        if not fill(param, lambda tensor: stock(tensor, *args, **kwargs)):
            stock(param, *args, **kwargs)

    with replaced(dummy_loader, initialize_single_dummy_weight=initialize_single_dummy_weight):
        yield


@contextmanager
def numbered_models(built: Callable[[], None]) -> Iterator[Callable[[], int]]:
    """While active, tells which model is being built: 0 for the first, then 1 for its drafter, ...

    A drafter's config may be the target's own (MTP, EAGLE), so nothing else tells their layers apart.

    Args:
        built: called once a model's layers exist, before it is loaded.
    """
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    stock_load, stock_create = BaseModelLoader.load_model, BaseModelLoader.create_model
    number = -1

    @functools.wraps(stock_load)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal number
        number += 1
        return stock_load(self, *args, **kwargs)

    @functools.wraps(stock_create)
    def create_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = stock_create(self, *args, **kwargs)
        built()
        return model

    with replaced(BaseModelLoader, load_model=load_model, create_model=create_model):
        yield lambda: number
