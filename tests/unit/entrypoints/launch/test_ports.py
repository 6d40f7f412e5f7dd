"""Ports that are free and that no connection takes meanwhile."""

from pathlib import Path

import pytest

from vllm_dwdp.entrypoints.launch import ports
from vllm_dwdp.entrypoints.launch.ports import free_ports, free_ports_in_a_row

pytestmark = pytest.mark.timeout(60)


def test_free_ports_are_none_of_the_others() -> None:
    low, high = map(int, ports.CONNECTING_PORTS.read_text().split())
    candidates = {*range(ports.FIRST_PORT, 65536)} - {*range(low, high + 1)}
    taken = {*sorted(candidates)[:-2000], None}
    found = {*free_ports(300, taken)}
    assert len(found) == 300 and not found & taken
    assert found <= candidates, "a connection may take another one before its server listens"


def test_free_ports_where_the_kernel_has_nearly_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ports._listening_ports.cache_clear()
    monkeypatch.setattr(ports, "CONNECTING_PORTS", tmp_path / "range")
    (tmp_path / "range").write_text("1024 65535")
    try:
        assert len(free_ports(3)) == 3
    finally:
        ports._listening_ports.cache_clear()


def test_ports_in_a_row() -> None:
    first = free_ports_in_a_row(3)
    assert free_ports_in_a_row(1, {first}) != first
