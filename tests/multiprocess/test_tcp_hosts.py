"""Ranks of two hosts, which network namespaces stand for."""

import multiprocessing
import os
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.hosts import enter_network_namespace, hosts  # noqa: F401
from tests.multiprocess.members import rank
from tests.multiprocess.tcp_places import FABRIC, meet_all, publish, secret_file
from vllm_dwdp.distributed.meeting import parse_endpoint

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.timeout(60),
    pytest.mark.usefixtures("nothing_leaks"),
]


def in_namespace(
    name: str, place: str, secret: str, number: int, results: "multiprocessing.Queue[object]"
) -> None:
    descriptor = os.open(f"/run/netns/{name}", os.O_RDONLY)
    enter_network_namespace(descriptor)
    member = rank(parse_endpoint(place, 2, secret), number, join_timeout_s=30.0)
    publish(member, FABRIC[number : number + 2])
    (met,) = meet_all([member])
    listening = [
        connection.laddr.ip
        for connection in psutil.Process().net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    results.put((number, met, listening))
    time.sleep(1.0)
    member.close()


def test_two_hosts_meet_over_the_named_interface(
    hosts: tuple[str, str],  # noqa: F811
    tmp_path: Path,
) -> None:
    secret, place = secret_file(tmp_path), "tcp://10.77.0.1,10.77.0.2:7100"
    spawn = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[object] = spawn.Queue()
    ranks = [
        spawn.Process(target=in_namespace, args=(name, place, secret, number, results))
        for number, name in enumerate(hosts)
    ]
    for process in ranks:
        process.start()
    met = sorted(results.get(timeout=40) for _ in ranks)
    assert met == [
        (0, {1: tuple(FABRIC[1:3])}, ["10.77.0.1"]),
        (1, {0: tuple(FABRIC[0:2])}, ["10.77.0.2"]),
    ]
    for process in ranks:
        process.join(timeout=20)
        assert process.exitcode == 0
        process.close()
    results.close()
    results.join_thread()
