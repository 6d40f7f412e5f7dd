"""What a start measures, and its check of both views: one differing byte stops it."""

import pytest
import torch

from vllm_dwdp.device.host import HostDevice
from vllm_dwdp.errors import TransferError
from vllm_dwdp.model_executor import measure
from vllm_dwdp.model_executor.composites import LayerView
from vllm_dwdp.model_executor.measure import _copy_seconds, _in_turns, check_views, measure_speeds


def view(value: float = float("nan")) -> LayerView:
    weight = torch.full((4, 8), value, dtype=torch.bfloat16)
    return LayerView(composites=(weight.view(-1).view(torch.uint8),), tensors={"w2_weight": weight})


def test_the_same_bytes_pass_whatever_they_mean() -> None:
    check_views("layers.3", ["w2_weight"], view(), view())


def test_one_differing_byte_is_refused() -> None:
    other = view()
    other.tensors["w2_weight"].view(torch.uint8)[3, 7] ^= 1
    with pytest.raises(TransferError, match="layers.3: w2_weight reads differently through"):
        check_views("layers.3", ["w2_weight"], view(), other)


def test_every_byte_that_is_timed_is_pulled_once() -> None:
    """Of two peers in turns; on the host, whose queue and kernels really move what is measured."""
    device = HostDevice()
    sources = [torch.full((size,), value, dtype=torch.uint8) for size, value in ((5, 1), (3, 2))]
    sizes = [5 * 2**20, 3 * 2**20]
    spans = [(source.repeat(2**20), size) for source, size in zip(sources, sizes, strict=True)]
    target = torch.zeros(sum(sizes), dtype=torch.uint8)
    addresses = [(tensor.data_ptr(), size) for tensor, size in spans]
    seconds, how = _copy_seconds(device, addresses, target.data_ptr())
    assert seconds > 0 and how
    assert (target == 1).sum() == sizes[0] and (target == 2).sum() == sizes[1]


def test_peers_take_turns() -> None:
    assert _in_turns([(0, 25), (100, 12)], 1000, 10) == [
        [(1000, 0, 10), (1010, 100, 10)],
        [(1020, 10, 10), (1030, 110, 2)],
        [(1032, 20, 5)],
    ]


def test_speeds_are_those_of_what_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes over the seconds that they took."""
    content = torch.ones(8 * 2**20, dtype=torch.uint8)
    peers = {1: (content.data_ptr(), content.numel())}
    speeds = measure_speeds(HostDevice(), peers)
    assert 1e6 < speeds.copy_bytes_per_s < 1e13 and 1e6 < speeds.memory_bytes_per_s < 1e13
    assert speeds.operations_per_s > 1e6 and not speeds.has_fp8
    monkeypatch.setattr(measure, "_copy_seconds", lambda *_: (8.0, "by hand"))
    slowed = measure_speeds(HostDevice(), peers)
    assert slowed.copy_bytes_per_s == 2**20
    assert "copies from peers 0.0 GB/s (by hand)" in str(slowed)
