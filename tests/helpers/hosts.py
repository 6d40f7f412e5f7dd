"""Two hosts, which network namespaces stand for."""

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

NAMESPACES = os.geteuid() == 0 and shutil.which("ip") is not None


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between them, 10.77.0.1 and 10.77.0.2."""
    names = (f"dwdp-a{os.getpid()}", f"dwdp-b{os.getpid()}")
    if not NAMESPACES:
        pytest.skip("needs root and iproute2 for network namespaces")
    made = []
    try:
        for name in names:
            if subprocess.run(
                ["ip", "netns", "add", name], capture_output=True, check=False
            ).returncode:
                pytest.skip("network namespaces cannot be made here")
            made.append(name)
        ip("link", "add", "va", "netns", names[0], "type", "veth", "peer", "vb", "netns", names[1])
        for name, device, address in zip(
            names, ("va", "vb"), ("10.77.0.1", "10.77.0.2"), strict=True
        ):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
            ip("-n", name, "addr", "add", f"{address.replace('77', '78')}/24", "dev", device)
            ip("-n", name, "link", "set", device, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in made:
            ip("netns", "delete", name)


def enter_network_namespace(descriptor: int) -> None:
    import ctypes

    clone_newnet = 0x40000000
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, clone_newnet):
        raise OSError(ctypes.get_errno(), "setns")
