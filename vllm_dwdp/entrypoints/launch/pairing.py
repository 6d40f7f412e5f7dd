"""Whether a decode server can use the KV blocks of a rank: looked at before it gets requests.

Two looks. First, what both say of themselves over HTTP must agree: so what differs has a name. Then a
prompt of ours goes the way that every request goes: a rank computes it, the decode server fetches its KV
blocks, and its figures must say that bytes arrived. Without that a decode server that cannot fetch would
compute every prompt itself, with the right answers, and no user would notice. Where none arrive, what
both answer at NIXL's side channels says why.
"""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from vllm_dwdp.compat.frontend.nixl import (
    Handshake,
    Question,
    name_differences,
    read_handshake,
)
from vllm_dwdp.entrypoints.launch.disaggregation import CONNECTOR
from vllm_dwdp.errors import DwdpConfigError

REQUEST_TIMEOUT_S = 120.0
FIGURES_TIMEOUT_S = 20.0
"""Figures follow a transfer with the server's next step."""
CACHE_INFO = "vllm:cache_config_info"
RECEIVED = "vllm:nixl_bytes_transferred_sum"
CACHE_FIELDS = {"block_size": "--block-size", "cache_dtype": "--kv-cache-dtype"}
NUM_PROMPT_BLOCKS = 2
WRONG_BACKENDS = {
    "CPU_MLA": "vLLM's CPU_MLA backend (0.32) decodes other tokens from KV blocks that were fetched "
    "than from its own, also between two stock servers"
}
"""Attention backends with which the bytes arrive, and the answers are wrong."""

_WITHOUT_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Server:
    """A server of a pair, and how it is asked.

    Args:
        name: for sentences.
        url: of it.
    """

    def __init__(self, name: str, url: str) -> None:
        self.name = f"{name} ({url})"
        self._url = url

    def get(self, path: str) -> str:
        """Return the answer to `GET path`."""
        return self._ask(path, None)

    def complete(self, **body: Any) -> dict[str, Any]:
        """Return the answer to a completion."""
        answer: dict[str, Any] = json.loads(self._ask("/v1/completions", json.dumps(body).encode()))
        return answer

    def metrics(self, name: str) -> list[tuple[dict[str, str], float]]:
        """Return the labels and values of a metric."""
        return [
            (sample.labels, sample.value)
            for family in text_string_to_metric_families(self.get("/metrics"))
            for sample in family.samples
            if sample.name == name
        ]

    def _ask(self, path: str, body: bytes | None) -> str:
        request = urllib.request.Request(
            self._url + path, body, {"Content-Type": "application/json"}
        )
        try:
            with _WITHOUT_PROXY.open(request, timeout=REQUEST_TIMEOUT_S) as response:
                return str(response.read().decode())
        except urllib.error.HTTPError as error:
            why = error.read().decode(errors="replace")[:300]
            raise DwdpConfigError(f"{self.name} answers {path} with {error.code}: {why}") from error
        except (OSError, http.client.HTTPException) as error:
            raise DwdpConfigError(f"{self.name} does not answer {path}: {error}") from error


def check_pairs(ranks: Sequence[Server], decode: Server, arguments: Sequence[str] = ()) -> None:
    """Refuse a decode server that cannot use the KV blocks of every rank, as `check_pair`."""
    for rank in ranks:
        check_pair(rank, decode, arguments)


def check_pair(rank: Server, decode: Server, arguments: Sequence[str] = ()) -> None:
    """Refuse a decode server that cannot use the KV blocks of a rank.

    Args:
        rank: of the pair.
        decode: of the pair.
        arguments: of the rank's `vllm serve`, its model first; empty where they are not known.

    Raises:
        DwdpConfigError: they differ, with the field and both values; or one does not answer, or no byte
            arrives.
    """
    rank_says, decode_says = facts(rank), facts(decode)
    for field, value in rank_says.items():
        if decode_says[field] != value:
            raise _differ(rank, decode, field, value, decode_says[field])
    request = _prompt(rank_says)
    offered = _offer(rank, request)
    if not offered:
        raise DwdpConfigError(
            f"{rank.name} offers no KV blocks: was --kv-transfer-config of launch changed?"
        )
    seen = _handshake(offered)
    if seen is not None and seen.backend in WRONG_BACKENDS:
        raise DwdpConfigError(
            f"{decode.name} cannot decode what {rank.name} computes: {WRONG_BACKENDS[seen.backend]}. "
            "Serve this model without decode servers, or on GPUs."
        )
    try:
        if _fetches(decode, request, offered):
            return
        problem = DwdpConfigError(
            f"{decode.name} has fetched no KV blocks from {rank.name}, at "
            f"{offered.get('remote_host')}:{offered.get('remote_port')}. Its log says why: where NIXL's "
            "compatibility hash differs, --dtype, the attention backend (KV layout) or "
            "--speculative-config does; else it may not reach that address."
        )
    except DwdpConfigError as error:
        problem = error
    for field, here, there in _explain(rank_says, offered, _offer(decode, request), arguments):
        raise _differ(rank, decode, field, here, there)
    raise problem


def _differ(rank: Server, decode: Server, field: str, here: str, there: str) -> DwdpConfigError:
    return DwdpConfigError(
        f"{decode.name} cannot decode what {rank.name} computes: {field} is "
        f"{there!r} there and {here!r} here. Start it with the same."
    )


def facts(server: Server) -> dict[str, str]:
    """Return what must agree, as a server says it.

    Raises:
        DwdpConfigError: it does not answer, or says nothing of the kind.
    """
    try:
        model = json.loads(server.get("/v1/models"))["data"][0]
        labels = server.metrics(CACHE_INFO)[0][0]
        return {
            "vLLM's version": json.loads(server.get("/version"))["version"],
            "the model": model["root"],
            "--served-model-name": model["id"],
        } | {option: labels[label] for label, option in CACHE_FIELDS.items()}
    except DwdpConfigError:
        raise
    except (ValueError, LookupError, TypeError) as error:
        raise DwdpConfigError(
            f"{server.name} does not say its version, model and KV cache as vllm serve does "
            f"({type(error).__name__}: {error}). Give the URL of a vllm serve of the ranks' version."
        ) from error


def _prompt(facts: dict[str, str]) -> dict[str, Any]:
    """Return a request for one token after some blocks that no server has seen before."""
    num_tokens = NUM_PROMPT_BLOCKS * int(facts[CACHE_FIELDS["block_size"]])
    # Of this moment, so that no prefix is cached where the decode server has seen it before.
    first = time.time_ns() % 10_000
    prompt = [1 + int(digit) for digit in f"{first:04}"] + [1] * num_tokens
    model = facts["--served-model-name"]
    return {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 1}


def _offer(server: Server, request: dict[str, Any]) -> dict[str, Any]:
    """Have a server compute a prompt; what it says of where the KV blocks are, empty if nothing."""
    params = {"do_remote_decode": True, "do_remote_prefill": False}
    offered = server.complete(**request, kv_transfer_params=params).get("kv_transfer_params")
    return dict(offered or {})


def _fetches(decode: Server, request: dict[str, Any], offered: dict[str, Any]) -> bool:
    """Offer blocks to a decode server; whether it counts bytes then."""
    before = _received(decode)
    decode.complete(**request, kv_transfer_params=offered)
    deadline = time.monotonic() + FIGURES_TIMEOUT_S
    while _received(decode) <= before:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _explain(
    facts: dict[str, str],
    ours: dict[str, Any],
    theirs: dict[str, Any],
    arguments: Sequence[str],
) -> Iterator[tuple[str, str, str]]:
    """Yield what makes a decode server fetch nothing: fields, with the value here and there.

    Args:
        facts: of both.
        ours: what the rank offers.
        theirs: what the decode server would offer; empty where it has no such connector.
        arguments: of the rank's `vllm serve`.
    """
    if not theirs:
        yield "the kv_connector of --kv-transfer-config", CONNECTOR, "none, or another one"
        return
    modes = [str(offered.get("transfer_mode")) for offered in (ours, theirs)]
    if modes[0] != modes[1]:
        yield "NIXL's transfer mode", modes[0], modes[1]
    here, there = _handshake(ours), _handshake(theirs)
    if here is None or there is None:
        return
    if here.backend != there.backend:
        yield "--attention-backend", here.backend, there.backend
    elif here.settings_hash != there.settings_hash and arguments:
        question = Question(
            arguments=arguments,
            cache_dtype=facts[CACHE_FIELDS["cache_dtype"]],
            backend=here.backend,
            transfer_mode=modes[0],
            hashes=(here.settings_hash, there.settings_hash),
        )
        for field, (of_rank, of_decode) in name_differences(question).items():
            yield field, of_rank, of_decode
    if here.layout != there.layout:
        yield "the KV layout (VLLM_KV_CACHE_LAYOUT)", here.layout, there.layout
    sizes = [str(sum(each.block_bytes)) for each in (here, there)]
    if sizes[0] != sizes[1]:
        yield "bytes of a KV block of all layers", sizes[0], sizes[1]


def _handshake(offered: dict[str, Any]) -> Handshake | None:
    """Return what the server answers at the address that it offers, if that is reached from here."""
    found = read_handshake(str(offered.get("remote_host")), int(offered.get("remote_port") or 0))
    is_that_server = found is not None and found.engine_id == offered.get("remote_engine_id")
    return found if is_that_server else None


def _received(server: Server) -> float:
    return sum(value for _, value in server.metrics(RECEIVED))
