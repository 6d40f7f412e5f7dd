"""What a rank checks before it maps a peer's experts, and the order in which it leaves."""

import zlib
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from gpu_checks.expert_ranks import ExpertShape, RankMemory
from tests.helpers.files import num_open_files
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.device.base import Handles
from vllm_dwdp.device.host import HostDevice
from vllm_dwdp.distributed.launch import DwdpLaunch, RankSpan, Seat
from vllm_dwdp.distributed.meeting import make_abstract_endpoint
from vllm_dwdp.distributed.published_shard import PublishedShard
from vllm_dwdp.errors import DwdpMemoryError, PeerMismatchError
from vllm_dwdp.model_executor import adoption
from vllm_dwdp.model_executor.group import ExpertGroup
from vllm_dwdp.model_executor.peers import PeerShards
from vllm_dwdp.model_executor.start_cost import StartCost

SHAPE = ExpertShape(num_experts=4, hidden_size=64, intermediate_size=32, top_k=2)
SEAT = Seat(
    DwdpLaunch(
        config=DwdpConfig(group_size=2),
        ranks=RankSpan(0, 2, 2),
        endpoint=make_abstract_endpoint(),
    ),
    0,
)


def peers_of(rank: RankMemory) -> PeerShards:
    """Return what `rank` maps of its peers: nothing yet."""
    return PeerShards(rank.device, rank.layout, rank.shard.layout_facts(), StartCost())


def published(rank: RankMemory, **changes: Any) -> PublishedShard:
    handles = rank.shard.memory.export()
    facts = {
        "rank": 1,
        "generation": 1,
        "fds": handles.fds,
        "fabric_handles": (),
        "handle_bytes": handles.num_bytes,
        "layout": rank.shard.layout_facts(),
        "digest": rank.shard.memory.digest(),
        "ready": True,
    }
    return PublishedShard(**facts | changes)


def test_experts_in_another_order_or_for_another_kernel_are_not_mapped() -> None:
    """Equal sizes are not enough: the bytes would be read as something else."""
    device = HostDevice()
    ranks = [RankMemory(device, SHAPE, 2, number, 2) for number in range(2)]
    peers = peers_of(ranks[0])
    peers.map_all({1: published(ranks[1])})
    peers.close()

    facts = ranks[1].shard.published[1].facts
    mine = dict(facts)
    for path, other, message in (
        ("kernel", "TRITON", "kernel: absent here, TRITON there"),
        ("w2_weight", "torch.float16 4096", r"w2_weight: torch.bfloat16 4096 here, torch.float16"),
        (
            "w2_input_scale",
            "float32 [] #12",
            r"w2_input_scale: absent here, float32 \[\] #12 there",
        ),
    ):
        facts.update({path: other})
        with pytest.raises(PeerMismatchError, match=rf"rank 1 .* \(layers.1, {message}.*VLLM_"):
            peers.map_all({1: published(ranks[1])})
        facts.clear()
        facts.update(mine)
    for unreadable in (b"", b"facts", zlib.compress(b"\xc1")):
        with pytest.raises(PeerMismatchError, match="laid out for other .*absent there"):
            peers.map_all({1: published(ranks[1], layout=unreadable)})
    assert not peers.mapped
    for rank in ranks:
        rank.close()


def test_a_lent_shard_must_be_what_its_dead_owner_published() -> None:
    device = HostDevice()
    ranks = [RankMemory(device, SHAPE, 2, number, 2) for number in range(2)]
    peers = peers_of(ranks[0])
    num_files = num_open_files()
    peers.map_all({1: published(ranks[1], is_lent=True)})
    changed = {1: published(ranks[1], is_lent=True, digest=b"as it was")}
    with pytest.raises(PeerMismatchError, match="a survivor that kept them has changed"):
        peers.map_all(changed)
    peers.close()
    assert num_open_files() == num_files
    for rank in ranks:
        rank.close()


def test_a_survivor_whose_copy_is_bad_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    device, rank = HostDevice(), RankMemory(HostDevice(), SHAPE, 1, 0, 2)
    kept = [published(rank, digest=b"changed"), published(rank), published(rank)]
    membership: Any = SimpleNamespace(recover=lambda: iter(kept))
    cost = StartCost()
    adopted = adoption.adopt_shard(device, membership, 0, cost)
    assert adopted is not None and adopted.shard.digest() == rank.shard.memory.digest()
    assert cost.digested_bytes == 2 * sum(kept[0].handle_bytes), "the bad one and the good one"
    assert adopted.layout == rank.shard.layout_facts()
    adopted.shard.close()
    kept[2].close()

    def refuse(handles: Handles) -> None:
        raise DwdpMemoryError("no such handle")

    monkeypatch.setattr(device, "adopt_shard", refuse)
    kept = [published(rank)]
    assert adoption.adopt_shard(device, membership, 0, cost) is None, "it loads from disk"
    rank.close()


def test_nobody_is_answered_any_more_when_the_ring_goes() -> None:
    """A status request reads the ring's counters in another thread."""
    order: list[str] = []
    resources = ExitStack()
    resources.callback(order.append, "ring")
    unused: Any = None
    membership: Any = SimpleNamespace(
        close=lambda: order.append("membership"), describe_by=lambda provider: None
    )
    group = ExpertGroup(
        seat=SEAT,
        membership=membership,
        layout=unused,
        views=unused,
        forwards=unused,
        weights=unused,
        rejoin_seconds=None,
        read_bytes=1,
        read_share=0.5,
        mappings={},
        cost=StartCost(),
        resources=resources,
    )
    group.close()
    assert order == ["membership", "ring"]
