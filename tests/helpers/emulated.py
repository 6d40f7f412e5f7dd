"""Another machine's Python under QEMU's user-mode emulation, from Debian's packages.

Nothing is installed: apt downloads into a folder of ours, with lists of its own.
"""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.environments import INSTALL_S, Unavailable

EMULATOR = "qemu-user-static"
PYTHON = "python3.11"
LIBRARIES = (
    f"lib{PYTHON}-minimal",
    f"lib{PYTHON}-stdlib",
    "libbz2-1.0",
    "libc6",
    "libexpat1",
    "libffi8",
    "libgcc-s1",
    "liblzma5",
    "libssl3",
    "libstdc++6",
    "zlib1g",
)
DEBIAN = {"aarch64": "arm64"}
"""Debian's names of machines."""


@dataclass(frozen=True, kw_only=True)
class EmulatedPython:
    """A Python of another machine, run by an emulator on this one."""

    machine: str
    emulator: Path
    root: Path

    def command(self, *arguments: str | Path, **environment: str | Path) -> list[str | Path]:
        """Return what runs `python ARGUMENTS` with these variables."""
        settings = [
            word for name, value in environment.items() for word in ("-E", f"{name}={value}")
        ]
        return [
            self.emulator,
            "-L",
            self.root,
            *settings,
            self.root / "usr/bin" / PYTHON,
            *arguments,
        ]


def emulated_python(folder: Path, machine: str) -> EmulatedPython:
    """Return the Python of a machine.

    Args:
        folder: for what is downloaded; once.

    Raises:
        Unavailable: this is no Debian 12, or its packages cannot be reached.
    """
    root, own = folder / "root", folder / "own"
    if not (folder / "done").exists():
        if not shutil.which("apt-get"):
            raise Unavailable("the packages of another machine come by apt-get, which is not here")
        _unpack(folder / machine, root, (f"{PYTHON}-minimal", *LIBRARIES), DEBIAN[machine])
        _unpack(folder / "emulator", own, (EMULATOR,), None)
        (folder / "done").touch()
    emulator = own / "usr/bin" / f"qemu-{machine}-static"
    return EmulatedPython(machine=machine, emulator=emulator, root=root)


def _unpack(folder: Path, target: Path, packages: tuple[str, ...], machine: str | None) -> None:
    """Download packages, by lists in `folder`, and unpack them."""
    (folder / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    options = [f"Dir::State={folder}", "Dir::State::status=/dev/null", f"Dir::Cache={folder}"]
    options += ["APT::Sandbox::User=root"]
    if machine:
        options += [f"APT::Architecture={machine}", f"APT::Architectures={machine}"]
    apt = ["apt-get", "-qq", *(f"-o{option}" for option in options)]
    _run([*apt, "update"], folder)
    _run([*apt, "download", *packages], folder)
    for package in folder.glob("*.deb"):
        _run(["dpkg", "-x", str(package), str(target)], folder)


def _run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(
            command, cwd=folder, check=True, capture_output=True, text=True, timeout=INSTALL_S
        )
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise Unavailable(f"{command[0]} {command[-1]}: {last}") from None
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{command[0]} took more than {INSTALL_S} s") from None
