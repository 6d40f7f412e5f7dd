"""Runs the services of a Compose file in containers that need no container runtime.

Only what our own files use is understood; any other key is an error, so that nothing in a file goes
unnoticed.
"""

import re
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.containers import Container, Network
from tests.helpers.waiting import wait_until

KEYS = {
    *("image", "user", "restart", "volumes", "environment", "healthcheck"),
    *("entrypoint", "command", "ports", "shm_size"),
}
VARIABLE = re.compile(r"\$\$|\$\{(\w+)(?:(:-|:\?)([^}]*))?\}")
RESTART_DELAY_S = 0.1
"""Docker's, for a container that ran for ten seconds and more."""


def load(file: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """Return a Compose file with its variables replaced.

    Raises:
        ValueError: a variable that the file demands is not set.
    """

    def replace(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        value = environment.get(found[1], "")
        if not value and found[2] == ":?":
            raise ValueError(f"{file.name}: {found[1]} is not set: {found[3]}")
        return value or (found[3] or "")

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: walk(each) for key, each in value.items()}
        if isinstance(value, list):
            return [walk(each) for each in value]
        return VARIABLE.sub(replace, value) if isinstance(value, str) else value

    content = walk(yaml.safe_load(file.read_text()))
    for service in content["services"].values():
        given = service.get("environment", {})
        passed = {
            key: environment.get(key) if value is None else value for key, value in given.items()
        }
        service["environment"] = {key: value for key, value in passed.items() if value is not None}
    return content


def num_bytes(text: str) -> int:
    """Return the bytes of a size of Compose; only `gb` is understood, which is GiB there."""
    number, unit = text[:-2], text[-2:]
    assert unit == "gb", text
    return int(number) * 2**30


class Project:
    """The running services of a Compose file; a context manager that ends them.

    Args:
        file: of the services.
        environment: of the shell that would call `docker compose up`.
        folder: for logs, volumes and everything else.
    """

    def __init__(self, file: Path, environment: Mapping[str, str], folder: Path) -> None:
        content = load(file, environment)
        self.services: dict[str, Any] = content["services"]
        self.folder = folder
        self.containers: dict[str, Container] = {}
        self.num_starts = dict.fromkeys(self.services, 0)
        self._volumes: dict[str, Any] = content.get("volumes", {})
        self._mounted: list[Path] = []
        self._ends = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise)

    def __enter__(self) -> "Project":
        for name, service in self.services.items():
            assert service.keys() <= KEYS, f"{name}: {service.keys() - KEYS} is not understood"
            assert service["restart"] == "always"
        self.network = Network([*self.services], self.folder)
        for name, volume in self._volumes.items():
            self._mount(self.folder / name, volume["driver_opts"])
        self._supervisor.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._supervisor.join()
        for folder in self._mounted:
            subprocess.run(["umount", str(folder)], check=True)
        self.network.close()

    def _mount(self, folder: Path, options: Mapping[str, str]) -> None:
        folder.mkdir()
        command = ["mount", "-t", options["type"], "-o", options["o"], options["device"]]
        subprocess.run([*command, str(folder)], check=True)
        self._mounted.append(folder)

    def _supervise(self) -> None:
        """Start every container, and again when it has ended, as `restart: always` says."""
        try:
            while not self._ends.is_set():
                for name in self.services:
                    if name not in self.containers or not self.containers[name].is_running:
                        self.containers[name] = self._start(name)
                self._ends.wait(RESTART_DELAY_S)
        finally:
            stopping = [threading.Thread(target=each.stop) for each in self.containers.values()]
            for thread in stopping:
                thread.start()
            for thread in stopping:
                thread.join()

    def _start(self, name: str) -> Container:
        service = self.services[name]
        mounts = {}
        for text in service.get("volumes", ()):
            source, path, *_ = text.split(":")
            mounts[path] = self.folder / source if source in self._volumes else Path(source)
        self.num_starts[name] += 1
        return Container(
            [*service["entrypoint"], *service["command"]],
            name=name,
            network=self.network,
            user=service["user"],
            environment=service["environment"],
            mounts=mounts,
            log=self.log(name),
            root=self.folder / f"{name}-root",
            **({"shm_bytes": num_bytes(service["shm_size"])} if "shm_size" in service else {}),
        )

    def log(self, name: str) -> Path:
        """Return the output of a service, of all its lives."""
        return self.folder / f"{name}.log"

    def url(self, name: str, port: int = 8000) -> str:
        """Where its network reaches a service."""
        return f"http://{self.network.addresses[name]}:{port}"

    def is_healthy(self, name: str) -> bool:
        """Whether the service's own health check succeeds now."""
        check = self.services[name]["healthcheck"]
        assert check["test"][0] == "CMD"
        timeout_s = float(check["timeout"].removesuffix("s"))
        return self.containers[name].execute(check["test"][1:], timeout_s) == 0

    def wait_until_healthy(self, *names: str, timeout_s: float) -> None:
        """Return once the health check of every one of these services succeeds.

        Raises:
            AssertionError: not in time, or a container ended.
        """
        wait_until(lambda: set(names) <= self.containers.keys())
        deadline = time.monotonic() + timeout_s
        began = {name: self.num_starts[name] for name in names}
        waiting = [*names]
        while waiting:
            waiting = [name for name in waiting if not self.is_healthy(name)]
            for name in waiting:
                tail = self.log(name).read_text(errors="replace")[-4000:]
                assert self.num_starts[name] == began[name], f"{name} ended:\n{tail}"
                assert time.monotonic() < deadline, f"{name} is not healthy:\n{tail}"
            time.sleep(0.5)
