"""The layer replacement while a model loads: what it keeps, what takes memory, and what is refused."""

import gc
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from tests.unit.model_executor.stand_in import NUM_EXPERTS, ROW, Loaded, Method, scales, weights
from vllm_dwdp.device.host import HostDevice
from vllm_dwdp.errors import DwdpUnsupportedError
from vllm_dwdp.model_executor.composites import CompositeMapper
from vllm_dwdp.model_executor.relocation import WatchedStorage
from vllm_dwdp.model_executor.views import bind_views
from vllm_dwdp.prefetch.mode_policy import Mode, ModePolicy

BF16 = 2


@pytest.mark.parametrize("fused", [False, True])
def test_a_rank_keeps_and_reads_its_large_rows_and_every_small_one(fused: bool) -> None:
    loaded = Loaded(1, fused=fused)
    layer = loaded.layer
    assert layer.w13_weight.shape == (2, ROW), "experts 3 and 4 of five"
    assert torch.equal(layer.w13_weight.data, weights()[3:])
    assert torch.equal(layer.w13_scale.data, scales())
    assert loaded.shard.read_share() == 2 / 5
    loaded.process()
    assert layer.quant_method.seen_bytes == NUM_EXPERTS * ROW * BF16, "vLLM sees all experts"
    assert layer.w13_weight.numel() == 0, "and they are in the shard afterwards"
    assert [weight.layout.name for weight in loaded.shard.published[0].weights] == ["w13_weight"]
    assert [rows.name for rows in loaded.shard.published[0].private] == ["w13_scale", "bias"]
    loaded.close()


def test_a_skipped_row_counts_as_loaded_for_vllm() -> None:
    loaded = Loaded(1)
    layer = loaded.layer
    given = (layer.w13_weight, weights()[0], "w13", "w1", 0)
    assert layer.weight_loader(*given) is None
    assert layer.weight_loader(*given, return_success=True) is True
    loaded.close()


def test_all_ranks_see_what_each_loaded_and_aliases_follow() -> None:
    """Large rows in place, small ones copied; the tensors are those that the kernel captured."""
    device = HostDevice()

    class Captures(Method):
        """A kernel that keeps a view, and packs scales as DeepGEMM does: experts outermost, strided."""

        def process(self, layer: Any) -> None:
            self.captured = [layer.w13_weight.data[:, ROW // 2 :], layer.w13_qweight]
            self.scaled = torch.empty_strided((2, NUM_EXPERTS), (1, 2))
            for expert in range(NUM_EXPERTS):
                self.scaled[:, expert] = layer.w13_weight.data[expert].float().abs().max()

    ranks = [Loaded(rank, Captures).process() for rank in range(2)]
    layouts = [rank.shard.seal() for rank in ranks]
    assert layouts[0] == layouts[1]
    assert ranks[0].shard.layout_facts() == ranks[1].shard.layout_facts()
    with ExitStack() as resources:
        peers = [{1 - n: device.open_peer(ranks[1 - n].shard.memory.export())} for n in range(2)]
        for reader, rank in enumerate(ranks):
            rank.shard.fill_edges(layouts[reader], peers[reader])
        for reader, rank in enumerate(ranks):
            shard, layer, method = rank.shard, rank.layer, rank.layer.quant_method
            shard.private_tensors(layouts[reader]).complete(peers[reader])
            mapper = CompositeMapper(
                device=device,
                layout=layouts[reader],
                layers=shard.published,
                dwdp_rank=reader,
                shard=shard.memory,
                peers=peers[reader],
                resources=resources,
            )
            bind_views(mapper, ModePolicy.forced(Mode.DIRECT), 4096, resources)
            assert torch.equal(layer.w13_weight.data, weights())
            assert layer.w13_qweight is layer.w13_weight is method.captured[1]
            assert torch.equal(method.captured[0], weights()[:, ROW // 2 :])
            assert torch.equal(method.scaled, weights().float().abs().amax(1).expand(2, -1))
            resources.callback(peers[reader][1 - reader].close)
            resources.callback(shard.close)


def test_adopted_experts_are_not_read_and_take_memory_only_while_they_are_processed() -> None:
    """Else a rank that returns would need its experts twice, which a GPU has no room for."""
    first = Loaded(1).process()
    layout = first.shard.seal()
    adopted = HostDevice().adopt_shard(first.shard.memory.export())
    again = Loaded(1, adopted=adopted)
    layer = again.layer
    assert layer.w13_weight.untyped_storage().nbytes() == 0
    assert again.shard.read_share() == 0
    again.process()
    assert layer.quant_method.seen_bytes == NUM_EXPERTS * ROW * BF16
    assert again.shard.seal() == layout
    assert again.shard.layout_facts() == first.shard.layout_facts()
    assert torch.equal(again.shard.published[0].private[0].tensors[0].tensor, scales())
    for each in (again, first):
        each.close()


def test_a_twins_memory_is_free_before_the_layer_is_processed() -> None:
    """Layers hold themselves in circles: waiting for the garbage collector would cost a layer more."""
    seen: list[WatchedStorage] = []
    gone: list[bool] = []

    class Watches(Method):
        def process(self, layer: Any) -> None:
            gone.extend(each.storage.expired() for each in seen)
            layer.itself = self.layer = layer
            seen.append(WatchedStorage.of("w13_weight", layer.w13_weight))

    gc.disable()
    try:
        loaded = Loaded(0, Watches).process()
    finally:
        gc.enable()
    assert len(seen) == 2 and gone == [True], "the twin's, then the layer's"
    loaded.close()


def test_a_twin_leaves_what_the_layer_shares_with_it() -> None:
    loaded = Loaded(0)
    loaded.bias.data.fill_(3)
    loaded.process()
    assert loaded.layer.bias is loaded.bias and loaded.bias.tolist() == [3.0] * NUM_EXPERTS
    loaded.close()


def refused(method: type, rank: int = 0) -> str:
    loaded = Loaded(rank, method)
    with pytest.raises(DwdpUnsupportedError) as caught:
        loaded.process()
    loaded.close()
    return str(caught.value)


def test_a_reduction_over_the_experts_of_a_large_tensor_is_refused() -> None:
    class Maximum(Method):
        def process(self, layer: Any) -> None:
            self.largest = layer.w13_weight.data.float().abs().amax().expand(NUM_EXPERTS).clone()

    assert "quant_method.largest depends on experts that other ranks hold" in refused(Maximum)

    class Number(Method):
        def process(self, layer: Any) -> None:
            self.scale = layer.w13_weight.data.float().abs().amax().item()

    assert "quant_method.scale depends on experts that other ranks hold" in refused(Number)


def test_a_kernel_that_keeps_the_old_memory_is_refused_by_the_holder() -> None:
    kept = []

    class Keeper:
        def __init__(self, weight: torch.Tensor) -> None:
            self.weight = weight

    class Keeps(Method):
        def process(self, layer: Any) -> None:
            kept[:] = [Keeper(layer.w13_weight.data[:])]

    message = refused(Keeps)
    assert "w13_weight was processed, but" in message and "Keeper keeps its memory" in message


def test_memory_of_before_that_processing_left_must_be_gone() -> None:
    kept = []

    class Repacks(Method):
        def process(self, layer: Any) -> None:
            kept[:] = [layer.w13_weight.data]
            layer.w13_weight.data = layer.w13_weight.data.clone()

    assert "w13_weight was processed, but list keeps its memory" in refused(Repacks)


def test_a_small_row_that_was_not_loaded_is_refused() -> None:
    """Its memory holds anything, and methods reduce over all rows."""
    loaded = Loaded(0)
    raw = loaded.layer.raw
    raw._loaded["w13_scale", "w1"].remove(4)
    with pytest.raises(
        DwdpUnsupportedError, match=r"gave no w13_scale \(w1\) for expert 4 \(1 of 5"
    ):
        loaded.process()
    loaded.close()


def test_storages_that_mix_experts_with_something_else_are_refused() -> None:
    class Mixes(Method):
        def process(self, layer: Any) -> None:
            memory = torch.zeros(NUM_EXPERTS * 1024 + 3)
            self.rows, self.rest = memory[:-3].view(NUM_EXPERTS, 1024), memory[-3:]

    message = refused(Mixes)
    assert "do not have one row per expert: quant_method.rows (5, 1024) (1024, 1), " in message
    assert "quant_method.rest (3,)" in message
