"""What launch asks the ranks where they meet: how far one came, and whether it can join."""

from pathlib import Path

import pytest

from tests.unit.distributed.test_messages import fingerprint
from tests.unit.entrypoints.launch.fakes import plan
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.distributed.meeting import parse_endpoint
from vllm_dwdp.distributed.membership import Membership
from vllm_dwdp.entrypoints.launch import launcher as launch
from vllm_dwdp.entrypoints.launch.asking import join_obstacle, rank_progress
from vllm_dwdp.entrypoints.launch.ports import free_ports

pytestmark = pytest.mark.timeout(60)


def test_the_question_what_a_rank_does_is_put_where_the_ranks_meet(tmp_path: Path) -> None:
    options = {"group_size": 2, "rendezvous": f"unix://{tmp_path}/meet"}
    ask = rank_progress(DwdpConfig.from_options(options, 4), rank=3)
    assert ask() == "", "nobody listens yet"
    place = parse_endpoint(options["rendezvous"])
    facts = {"group_size": 2, "fingerprint": fingerprint(), "join_timeout_s": 0.3}
    with Membership.join(place, group=1, dwdp_rank=1, **facts) as member:
        assert ask() == "loads its experts"
        with pytest.raises(TimeoutError):
            member.meet()
        assert ask().startswith("waits for ranks [0] to publish their experts (")
        member.describe_by(lambda: {"state": "warming up"})
        assert ask() == "has its experts and warms up"
    assert ask() == ""


def test_of_several_workers_the_first_that_starts_is_quoted(tmp_path: Path) -> None:
    options = {"group_size": 2, "rendezvous": f"unix://{tmp_path}/meet"}
    config = DwdpConfig.from_options(options, 4)
    ask = rank_progress(config, rank=3, num_workers=2)
    place = parse_endpoint(options["rendezvous"])
    facts = {"group_size": 2, "fingerprint": fingerprint(), "join_timeout_s": 0.3}
    with (
        Membership.join(place, group=2, dwdp_rank=1, **facts) as first,
        Membership.join(place, group=3, dwdp_rank=1, **facts) as second,
    ):
        first.describe_by(lambda: {"state": "warming up"})
        assert ask() == "loads its experts"
        second.describe_by(lambda: {"state": "warming up"})
        assert ask() == "has its experts and warms up"


def test_a_rank_that_its_group_cannot_take_is_not_started(tmp_path: Path) -> None:
    options = {"group_size": 2, "rendezvous": f"unix://{tmp_path}/meet"}
    ask = join_obstacle(DwdpConfig.from_options(options, 4), rank=2, num_workers=2)
    assert ask() == "", "nobody lives"
    place = parse_endpoint(options["rendezvous"])
    facts = {"group_size": 2, "fingerprint": fingerprint(), "join_timeout_s": 0.3}
    said: dict[str, object] = {"state": "serving", "weight_update": 0, "last_failure": "no disk"}
    with Membership.join(place, group=3, dwdp_rank=1, **facts) as peer:
        assert ask() == "", "it starts"
        peer.describe_by(lambda: said)
        said["weights"] = {"digest": "dummy-0", "checkpoint": "/m"}
        assert ask() == ""
        said |= {"weight_update": 2, "weights": {"digest": "update 5", "checkpoint": None}}
        assert ask() == (
            "rank 2 cannot join its group: a trainer has sent its weights (update 2), which no start "
            "can read. Restart all ranks, and send them again"
        )
        said["weights"] = {"digest": "1a", "checkpoint": "/m"}
        assert ask() == ""
        said["state"] = "refusing"
        assert ask() == "rank 2 cannot join its group: no disk"
    assert ask() == ""


def test_launch_asks_whether_a_rank_can_join_before_it_starts_one(tmp_path: Path) -> None:
    options = {"group_size": 2, "rendezvous": f"unix://{tmp_path}/meet"}
    config = DwdpConfig.from_options(options, 2)
    ports = tuple(free_ports(2))
    made = launch._rank_child(plan(rank_ports=ports), config, 0, tmp_path, {})
    place = parse_endpoint(options["rendezvous"])
    facts = {"group_size": 2, "fingerprint": fingerprint(), "join_timeout_s": 0.3}
    with Membership.join(place, group=0, dwdp_rank=1, **facts) as peer:
        peer.describe_by(lambda: {"state": "refusing", "last_failure": "no disk"})
        assert made.obstacle() == "rank 0 cannot join its group: no disk"
    assert made.obstacle() == ""


def test_a_rank_that_shares_nothing_is_not_asked(tmp_path: Path) -> None:
    options = {"mode": "replica", "rendezvous": f"unix://{tmp_path}/meet"}
    assert rank_progress(DwdpConfig.from_options(options, 2), rank=1)() == ""
