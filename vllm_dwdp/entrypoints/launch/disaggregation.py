"""Disaggregated serving: ranks that compute prompts, stock servers that decode, KV blocks over NIXL.

A rank keeps the KV blocks of a prompt until a decode server has fetched them, and offers them at its
side channel. A decode server that cannot fetch them computes the prompt itself, so that a rank's death
costs time and no request.
"""

import importlib.util
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any
from urllib.parse import urlsplit

from vllm_dwdp.entrypoints.launch.memory import Shares
from vllm_dwdp.errors import DwdpConfigError

CONNECTOR = "NixlConnector"
PRODUCER, CONSUMER = "kv_producer", "kv_consumer"
SIDE_CHANNEL_PORT_ENV = "VLLM_NIXL_SIDE_CHANNEL_PORT"
SIDE_CHANNEL_HOST_ENV = "VLLM_NIXL_SIDE_CHANNEL_HOST"

_TRANSFER = "--kv-transfer-config"
TENSOR_PARALLEL = "--tensor-parallel-size"
_SIZES = {
    TENSOR_PARALLEL: ("-tp",),
    "--pipeline-parallel-size": ("-pp",),
    "--data-parallel-size": ("-dp",),
}
"""Options of a decode server that multiply its devices, with their short names."""
_NOT_FOR_DECODE = {
    "--host": "launch chooses it",
    "--port": "launch chooses it",
    "--additional-config": "decode servers are stock",
    "--kv-transfer-config": "give it to launch itself, for both sides",
}


@dataclass(frozen=True, kw_only=True)
class Disaggregation:
    """What a launch has besides ranks when these only compute prompts.

    Args:
        decode_ports: one for each decode server that launch starts.
        decode_arguments: of each of them, after those of every server.
        memory: of each process where the CPU computes; None leaves it to vLLM and the user.
        decode_urls: of servers that already run elsewhere.
        relay_ports: one for each rank; the router asks there (`relay`).
        door_ports: one for each decode server; the router finds it there (`door`).
        side_channel_ports: the first one of the ranks (rank r has the r-th from it), then one for each
            decode server.
        transfer: fields of the user's own for the transfer config of both sides.
        only_prefill: whether the user's own router and decode servers are in front of the ranks.
    """

    decode_ports: tuple[int, ...] = ()
    decode_arguments: tuple[str, ...] = ()
    memory: Shares | None = None
    decode_urls: tuple[str, ...] = ()
    relay_ports: tuple[int, ...] = ()
    door_ports: tuple[int, ...] = ()
    side_channel_ports: tuple[int, ...]
    transfer: Mapping[str, Any] = field(default_factory=dict)
    only_prefill: bool = False

    @property
    def urls(self) -> list[str]:
        """The URLs of all decode servers, those that launch starts first."""
        return [f"http://127.0.0.1:{port}" for port in self.decode_ports] + list(self.decode_urls)

    def memory_arguments(self, role: str) -> tuple[str, ...]:
        """Return the share of the machine's memory that a server of one side takes."""
        if self.memory is None:
            return ()
        return Shares.arguments(self.memory.rank if role == PRODUCER else self.memory.decode)

    def transfer_arguments(self, role: str) -> list[str]:
        """Return the `--kv-transfer-config` of one side."""
        config = {"kv_connector": CONNECTOR, **self.transfer, "kv_role": role}
        if role == CONSUMER:
            config.setdefault("kv_load_failure_policy", "recompute")
        return [_TRANSFER, json.dumps(config)]

    def side_channel(self, index: int) -> dict[str, str]:
        """Variables that say where a side listens: 0 is all ranks, n decode server n - 1."""
        return {SIDE_CHANNEL_PORT_ENV: str(self.side_channel_ports[index])}


def devices_of(arguments: Sequence[str]) -> int:
    """Devices that a `vllm serve` with these arguments takes.

    Raises:
        DwdpConfigError: a size is no positive number.
    """
    return math.prod(size_of(arguments, name) for name in _SIZES)


def size_of(arguments: Sequence[str], name: str) -> int:
    """Return the value of an option of `_SIZES` among arguments for `vllm serve`; the last one counts.

    Raises:
        DwdpConfigError: it is no positive number.
    """
    size = 1
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        given, separator, value = argument.partition("=")
        if given.replace("_", "-") == name or given in _SIZES[name]:
            text = value if separator else following
            if not text.isdecimal() or int(text) == 0:
                raise DwdpConfigError(f"{given} {text!r} must be a positive number.")
            size = int(text)
    return size


def split_decode_arguments(text: str) -> tuple[str, ...]:
    """Return the words of `--decode-args`.

    Raises:
        DwdpConfigError: a quote is open, or an argument is ours to give.
    """
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise DwdpConfigError(f"--decode-args {text!r}: {error}.") from error
    for word in words:
        name = word.partition("=")[0].replace("_", "-")
        if name in _NOT_FOR_DECODE:
            raise DwdpConfigError(
                f"--decode-args: {name} cannot be given to decode servers: {_NOT_FOR_DECODE[name]}."
            )
    devices_of(words)
    return words


def take_transfer_config(arguments: Sequence[str]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Take `--kv-transfer-config` out of the arguments of every server.

    Raises:
        DwdpConfigError: it is no JSON object, or names another connector.
    """
    rest, config, words = [], {}, iter(arguments)
    for word in words:
        given, separator, value = word.partition("=")
        if given.replace("_", "-") != _TRANSFER:
            rest.append(word)
            continue
        text = value if separator else next(words, "")
        try:
            config = json.loads(text)
        except json.JSONDecodeError as error:
            raise DwdpConfigError(f"{_TRANSFER} {text!r} is not JSON: {error}.") from error
        if not isinstance(config, dict) or config.get("kv_connector", CONNECTOR) != CONNECTOR:
            raise DwdpConfigError(
                f"{_TRANSFER} {text!r} must be a JSON object, and its kv_connector {CONNECTOR}: launch "
                "and its router know no other one. Give the fields that differ only."
            )
    return tuple(rest), config


def check_url(url: str) -> str:
    """Return a `--decode-url` without a slash at its end.

    Raises:
        DwdpConfigError: it is no URL of a server.
    """
    try:
        parts = urlsplit(url)
        is_server = parts.scheme == "http" and bool(parts.hostname) and parts.port is not None
    except ValueError:
        is_server = False
    if not is_server or parts.query or parts.path.rstrip("/"):
        raise DwdpConfigError(f"--decode-url {url!r} must be like http://host:port.")
    return url.rstrip("/")


def check_side_channel(
    environment: Mapping[str, str], host: str, decode_urls: Sequence[str], only_prefill: bool
) -> None:
    """Refuse servers elsewhere that would look for the ranks' side channels on their own machine.

    Raises:
        DwdpConfigError: the address at which they reach this machine is not set.
    """
    if environment.get(SIDE_CHANNEL_HOST_ENV):
        return
    elsewhere = [url for url in decode_urls if not _is_loopback(urlsplit(url).hostname or "")]
    asked = f"--decode-url {elsewhere[0]}" if elsewhere else f"--prefill-only --host {host}"
    if elsewhere or (only_prefill and not _is_loopback(host)):
        raise DwdpConfigError(
            f"{asked}: set {SIDE_CHANNEL_HOST_ENV} to the address at which the decode servers reach "
            "this machine; the ranks offer their KV blocks there, and its default is localhost."
        )


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def check_nixl() -> None:
    """Refuse to start without NIXL, before minutes go into starting servers.

    Raises:
        DwdpConfigError: it is not installed, or cannot be loaded.
    """
    advice = "Install it with `pip install nixl` (the extra `launch`)."
    if importlib.util.find_spec("nixl") is None:
        raise DwdpConfigError(
            f"disaggregated serving needs NIXL, which carries KV blocks and is not installed. {advice}"
        )
    # In a process of its own: NIXL reads its variables when it is loaded.
    loaded = subprocess.run(
        [sys.executable, "-c", "import nixl"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ,
    )
    if loaded.returncode:
        why = (loaded.stderr.strip().splitlines() or [f"it ended with {loaded.returncode}"])[-1]
        raise DwdpConfigError(f"NIXL, which carries KV blocks, cannot be loaded: {why}. {advice}")
