"""Ranks of one group that a test lets meet."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.unit.distributed.test_messages import fingerprint
from vllm_dwdp.distributed.endpoint import Endpoint
from vllm_dwdp.distributed.meeting import parse_endpoint
from vllm_dwdp.distributed.membership import Membership


def rank(endpoint: Endpoint, number: int, size: int = 2, **options: Any) -> Membership:
    return Membership.join(
        endpoint,
        group=0,
        dwdp_rank=number,
        group_size=size,
        fingerprint=options.pop("fingerprint", fingerprint()),
        join_timeout_s=options.pop("join_timeout_s", 10.0),
    )


def publish(member: Membership) -> int:
    fd = os.memfd_create(f"dwdp-{member.dwdp_rank}")
    os.write(fd, b"%d" % member.dwdp_rank)
    member.publish([fd], [4096])
    return fd


def meet_all(members: list[Membership]) -> None:
    with ThreadPoolExecutor(len(members)) as pool:
        for shards in pool.map(lambda member: member.meet(), members):
            for shard in shards.values():
                shard.close()
        for member in members:
            member.announce_ready(b"digest")
        list(pool.map(lambda member: member.wait_ready(), members))


def run_rank(location: str, number: int) -> None:
    member = rank(parse_endpoint(location), number)
    publish(member)
    for shard in member.meet().values():
        shard.close()
    time.sleep(60)
