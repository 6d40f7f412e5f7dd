"""Whether a decode server can use the KV blocks of a rank: looked at before the first request.

Two looks. First, what both say of themselves over HTTP must agree: so what differs has a name. Then a
prompt of ours goes the way that every request goes: a rank computes it, the decode server fetches its KV
blocks, and its figures must say that bytes arrived. Without that a decode server that cannot fetch would
compute every prompt itself, with the right answers, and nobody would notice.
"""

import json
import time
import urllib.error
import urllib.request
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from vllm_dwdp.errors import DwdpConfigError

REQUEST_TIMEOUT_S = 120.0
FIGURES_TIMEOUT_S = 20.0
"""Figures follow a transfer with the server's next step."""
CACHE_INFO = "vllm:cache_config_info"
RECEIVED = "vllm:nixl_bytes_transferred_sum"
CACHE_FIELDS = {"block_size": "--block-size", "cache_dtype": "--kv-cache-dtype"}
NUM_PROMPT_BLOCKS = 2

_WITHOUT_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Server:
    """A server of a pair, and how it is asked.

    Args:
        name: for sentences.
        url: of it.
        api_key: that clients of it send; empty without one.
    """

    def __init__(self, name: str, url: str, api_key: str) -> None:
        self.name = f"{name} ({url})"
        self._url = url
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def get(self, path: str) -> str:
        """The answer to `GET path`."""
        return self._ask(path, None)

    def complete(self, **body: Any) -> dict[str, Any]:
        """The answer to a completion."""
        answer: dict[str, Any] = json.loads(self._ask("/v1/completions", json.dumps(body).encode()))
        return answer

    def metrics(self, name: str) -> list[tuple[dict[str, str], float]]:
        """The labels and values of a metric."""
        return [
            (sample.labels, sample.value)
            for family in text_string_to_metric_families(self.get("/metrics"))
            for sample in family.samples
            if sample.name == name
        ]

    def _ask(self, path: str, body: bytes | None) -> str:
        request = urllib.request.Request(self._url + path, body, self._headers)
        try:
            with _WITHOUT_PROXY.open(request, timeout=REQUEST_TIMEOUT_S) as response:
                return str(response.read().decode())
        except urllib.error.HTTPError as error:
            why = error.read().decode(errors="replace")[:300]
            raise DwdpConfigError(f"{self.name} answers {path} with {error.code}: {why}") from error
        except OSError as error:
            raise DwdpConfigError(f"{self.name} does not answer {path}: {error}") from error


def check_pair(rank: Server, decode: Server) -> None:
    """Refuse a decode server that cannot use the KV blocks of a rank.

    Raises:
        DwdpConfigError: they differ, with the field and both values, or no byte arrives.
    """
    rank_says, decode_says = facts(rank), facts(decode)
    for field, value in rank_says.items():
        if decode_says[field] != value:
            raise DwdpConfigError(
                f"{decode.name} cannot decode what {rank.name} computes: {field} is "
                f"{decode_says[field]!r} there and {value!r} here. Start it with the same."
            )
    _prove(rank, decode, rank_says)


def facts(server: Server) -> dict[str, str]:
    """What must agree, as a server says it."""
    model = json.loads(server.get("/v1/models"))["data"][0]
    labels = server.metrics(CACHE_INFO)[0][0]
    return {
        "vLLM's version": json.loads(server.get("/version"))["version"],
        "the model": model["root"],
        "--served-model-name": model["id"],
    } | {option: labels[label] for label, option in CACHE_FIELDS.items()}


def _prove(rank: Server, decode: Server, facts: dict[str, str]) -> None:
    before = _received(decode)
    num_tokens = NUM_PROMPT_BLOCKS * int(facts[CACHE_FIELDS["block_size"]])
    # Of this moment, so that no prefix is cached where the decode server has seen it before.
    first = time.time_ns() % 10_000
    prompt = [1 + int(digit) for digit in f"{first:04}"] + [1] * num_tokens
    request = {"model": facts["--served-model-name"], "prompt": prompt, "temperature": 0}
    asked = {"do_remote_decode": True, "do_remote_prefill": False}
    computed = rank.complete(**request, max_tokens=1, kv_transfer_params=asked)
    offered = computed.get("kv_transfer_params")
    if not offered:
        raise DwdpConfigError(
            f"{rank.name} offers no KV blocks: was --kv-transfer-config of launch changed?"
        )
    decode.complete(**request, max_tokens=1, kv_transfer_params=offered)
    deadline = time.monotonic() + FIGURES_TIMEOUT_S
    while _received(decode) <= before:
        if time.monotonic() > deadline:
            raise DwdpConfigError(
                f"{decode.name} has fetched no KV blocks from {rank.name}, at "
                f"{offered.get('remote_host')}:{offered.get('remote_port')}. Its log "
                "says why: where NIXL's compatibility hash differs, --dtype, the attention backend (KV "
                "layout) or --speculative-config does; else it may not reach that address."
            )
        time.sleep(0.2)


def _received(server: Server) -> float:
    return sum(value for _, value in server.metrics(RECEIVED))
