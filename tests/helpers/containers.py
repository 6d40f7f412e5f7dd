"""Containers without a container runtime: namespaces and a root folder of their own, on one network.

A container has PIDs, mounts, IPC, a host name, a network interface and a `/dev/shm` of its own.
In the place of an image it sees this machine's programs, the Python environment of the tests and this
checkout, all read-only.
"""

import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
SHM_BYTES = 64 * 2**20
"""Of Docker's and Kubernetes' `/dev/shm`."""
NAMESPACES = ("--mount", "--propagation", "private", "--pid", "--ipc", "--uts", "--fork")
IMAGE = ("/usr", "/etc", sys.base_prefix, os.path.realpath(sys.prefix), str(ROOT))
"""Folders of this machine that a container sees."""
LINKS = ("bin", "sbin", "lib", "lib32", "lib64")
DEVICES = ("null", "zero", "full", "random", "urandom")
PROGRAMS = f"{os.path.realpath(sys.prefix)}/bin:/usr/local/bin:/usr/bin:/usr/sbin"
CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1
PATIENCE_S = 20.0


def why_not() -> str:
    """Why no container can be made here; empty if one can."""
    if os.geteuid() or not shutil.which("ip"):
        return "needs root and iproute2"
    command = ["unshare", "--net", *NAMESPACES, "mount", "-t", "tmpfs", "none", "/mnt"]
    tried = subprocess.run(command, capture_output=True, check=False, text=True)
    return tried.stderr.strip()


def run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


class Network:
    """A bridge in a network namespace of its own, and an interface for each name; `close` removes all.

    Args:
        names: of the hosts on it, which find each other by name.
        folder: for the file of names.
    """

    PREFIX = "10.99.0."

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        self.addresses = {name: f"{self.PREFIX}{10 + at}" for at, name in enumerate(names)}
        self.hosts = folder / "hosts"
        lines = [f"{address}\t{name}\n" for name, address in self.addresses.items()]
        self.hosts.write_text("127.0.0.1\tlocalhost\n" + "".join(lines))
        self._made: list[str] = []
        try:
            bridge = self._add("bridge")
            run("ip", "-n", bridge, "link", "add", "br0", "type", "bridge")
            run("ip", "-n", bridge, "address", "add", f"{self.PREFIX}1/24", "dev", "br0")
            run("ip", "-n", bridge, "link", "set", "br0", "up")
            for at, (name, address) in enumerate(self.addresses.items()):
                host = self._add(name)
                pair = ("type", "veth", "peer", "name", "eth0", "netns", host)
                run("ip", "-n", bridge, "link", "add", f"v{at}", *pair)
                run("ip", "-n", bridge, "link", "set", f"v{at}", "master", "br0", "up")
                run("ip", "-n", host, "address", "add", f"{address}/24", "dev", "eth0")
                run("ip", "-n", host, "link", "set", "eth0", "up")
        except BaseException:
            self.close()
            raise

    def _add(self, name: str) -> str:
        namespace = self.namespace(name)
        run("ip", "netns", "add", namespace)
        self._made.append(namespace)
        run("ip", "-n", namespace, "link", "set", "lo", "up")
        return namespace

    @staticmethod
    def namespace(name: str) -> str:
        """Return the network namespace of a host, or of the `bridge` itself."""
        return f"dwdp-{os.getpid()}-{name}"

    def threads(self, count: int = 1) -> ThreadPoolExecutor:
        """Threads that are on this network, as a client of a published port is."""
        return ThreadPoolExecutor(count, initializer=self._enter)

    def _enter(self) -> None:
        place = os.open(f"/run/netns/{self.namespace('bridge')}", os.O_RDONLY)
        try:
            if ctypes.CDLL(None, use_errno=True).setns(place, CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        finally:
            os.close(place)

    def close(self) -> None:
        """Remove every namespace, and with them the interfaces."""
        while self._made:
            run("ip", "netns", "delete", self._made.pop())


class Container:
    """A running program in a container, killed with everything in it when the starting thread ends.

    Args:
        command: to run, as its process 1.
        name: of the host on `network`.
        user: `uid:gid`.
        environment: all of it but PATH, PYTHONPATH and HOME.
        mounts: folders of this machine by their path in the container.
        log: file for its output, which is appended.
        root: an empty folder; everything is mounted there, visible to the container only.
        shm_bytes: of its `/dev/shm`.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        name: str,
        network: Network,
        user: str,
        environment: Mapping[str, str],
        mounts: Mapping[str, Path],
        log: Path,
        root: Path,
        shm_bytes: int = SHM_BYTES,
    ) -> None:
        known = {"PATH": PROGRAMS, "PYTHONPATH": str(ROOT), "HOME": "/", "HOSTNAME": name}
        self._environment = ["env", "-i", *(f"{k}={v}" for k, v in (known | environment).items())]
        self._identity = user.split(":")
        script = "\n".join(set_up(root, network.hosts, name, mounts, shm_bytes))
        inside = ["chroot", f"--userspec={user}", "--groups=", str(root), *self._environment]
        prctl = ctypes.CDLL(None).prctl
        root.mkdir(exist_ok=True)
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{network.namespace(name)}"]
                + ["unshare", *NAMESPACES, "--kill-child"]
                + ["sh", "-euc", script + '\nexec "$@"', "sh", *inside, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL),  # noqa: PLW1509
            )

    @property
    def first_process(self) -> psutil.Process | None:
        """Its process 1; None if it has ended."""
        children = psutil.Process(self.process.pid).children() if self.is_running else []
        return children[0] if children else None

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def execute(self, command: Iterable[str], timeout_s: float) -> int | None:
        """Run a command in it, as `docker exec`; its exit code, None if that takes too long."""
        first = self.first_process
        if first is None:
            return 1
        uid, gid = self._identity
        enter = ["nsenter", "--all", "--root", "--wd", f"--target={first.pid}"]
        enter += [f"--setuid={uid}", f"--setgid={gid}"]
        try:
            return subprocess.run(
                [*enter, *self._environment, *command],
                capture_output=True,
                timeout=timeout_s,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """SIGKILL to its process 1; the kernel ends all others of the container."""
        if first := self.first_process:
            first.kill()

    def stop(self) -> None:
        """SIGTERM to its process 1, and SIGKILL where that does not end it."""
        if first := self.first_process:
            first.terminate()
            try:
                self.process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                first.kill()
        self.process.wait(PATIENCE_S)


def set_up(
    root: Path, hosts: Path, name: str, mounts: Mapping[str, Path], shm_bytes: int
) -> list[str]:
    """Return the shell commands that make a container's root folder and host name."""
    lines = [shlex.join(["mount", "-t", "tmpfs", "-o", "mode=755", "image", str(root)])]

    def make(path: str, *what: str, options: str = "") -> None:
        place = f"{root}/{path.lstrip('/')}"
        lines.append(shlex.join(["mkdir", "-p", place]))
        lines.append(shlex.join(["mount", *what, place]))
        if options:
            lines.append(shlex.join(["mount", "-o", f"remount,bind,{options}", place]))

    for folder in IMAGE:
        make(folder, "--bind", folder, options="ro")
    for link in LINKS:
        if os.path.islink(f"/{link}"):
            lines.append(shlex.join(["ln", "-s", os.readlink(f"/{link}"), f"{root}/{link}"]))
        elif os.path.isdir(f"/{link}"):
            make(link, "--bind", f"/{link}", options="ro")
    lines.append(shlex.join(["mount", "--bind", str(hosts), f"{root}/etc/hosts"]))
    make("proc", "-t", "proc", "proc")
    make("sys", "-t", "sysfs", "-o", "ro", "sysfs")
    make("tmp", "-t", "tmpfs", "-o", "mode=1777", "tmp")
    make("dev", "-t", "tmpfs", "-o", "mode=755", "dev")
    for device in DEVICES:
        lines.append(shlex.join(["touch", f"{root}/dev/{device}"]))
        lines.append(shlex.join(["mount", "--bind", f"/dev/{device}", f"{root}/dev/{device}"]))
    lines.append(shlex.join(["ln", "-s", "/proc/self/fd", f"{root}/dev/fd"]))
    make("dev/shm", "-t", "tmpfs", "-o", f"mode=1777,size={shm_bytes}", "shm")
    for path, folder in mounts.items():
        make(path, "--bind", str(folder))
    return [*lines, shlex.join(["hostname", name])]
