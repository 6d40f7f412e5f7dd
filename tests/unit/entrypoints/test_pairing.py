"""A rank and a decode server that must fit, with small real servers that say what theirs would."""

import http.server
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.unit.entrypoints.test_relay import served
from vllm_dwdp.entrypoints.launch import pairing
from vllm_dwdp.entrypoints.launch.pairing import Server, check_pair
from vllm_dwdp.errors import DwdpConfigError

pytestmark = pytest.mark.timeout(60)
OFFERED = {"do_remote_prefill": True, "remote_host": "h", "remote_port": 5600}


class Fake(http.server.ThreadingHTTPServer):
    """Says what it is told to, and counts bytes when it is offered blocks and can fetch."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.says = {
            "version": "0.32.0",
            "root": "/models/m",
            "id": "m",
            "block_size": "32",
            "cache_dtype": "auto",
            "offers": OFFERED,
            "fetches": True,
            "key": "",
        } | changes
        self.received = 0
        self.asked: list[dict[str, Any]] = []


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Fake

    def do_GET(self) -> None:
        says = self.server.says
        texts = {
            "/version": json.dumps({"version": says["version"]}),
            "/v1/models": json.dumps({"data": [{"root": says["root"], "id": says["id"]}]}),
            "/metrics": (
                "# TYPE vllm:cache_config_info gauge\n"
                f'vllm:cache_config_info{{block_size="{says["block_size"]}",'
                f'cache_dtype="{says["cache_dtype"]}"}} 1.0\n'
                "# TYPE vllm:nixl_bytes_transferred histogram\n"
                f"vllm:nixl_bytes_transferred_sum {self.server.received}\n"
            ),
        }
        self._answer(texts[self.path])

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        if asked["kv_transfer_params"] == OFFERED:
            self.server.received += self.server.says["fetches"] and 4096
            self._answer("{}")
        else:
            self._answer(json.dumps({"kv_transfer_params": self.server.says["offers"]}))

    def _answer(self, text: str) -> None:
        key = self.server.says["key"]
        is_let_in = not key or self.headers["Authorization"] == f"Bearer {key}"
        self.send_response(200 if is_let_in else 401)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def pair(rank: Fake, decode: Fake, key: str = "") -> Iterator[tuple[Server, Server]]:
    with served(rank) as ours, served(decode) as theirs:
        yield Server("rank 0", ours, key), Server("decode 0", theirs, key)


def test_a_pair_that_fits() -> None:
    rank, decode = Fake(key="k"), Fake(key="k")
    with pair(rank, decode, "k") as servers:
        check_pair(*servers)
    ((computed,), (fetched,)) = rank.asked, decode.asked
    assert computed["prompt"] == fetched["prompt"] and len(fetched["prompt"]) > 2 * 32
    assert computed["kv_transfer_params"]["do_remote_decode"]
    assert fetched["kv_transfer_params"] == OFFERED


@pytest.mark.parametrize(
    ("field", "label"),
    [
        ("version", "vLLM's version"),
        ("root", "the model"),
        ("id", "--served-model-name"),
        ("block_size", "--block-size"),
        ("cache_dtype", "--kv-cache-dtype"),
    ],
)
def test_what_differs_has_a_name(field: str, label: str) -> None:
    rank, decode = Fake(), Fake(**{field: "64"})
    with pair(rank, decode) as servers:
        here = rank.says[field]
        problem = rf"decode 0 \(.*\) cannot .* {label} is '64' there and '{here}' here"
        with pytest.raises(DwdpConfigError, match=problem):
            check_pair(*servers)
    assert not rank.asked, "nothing is computed for a server that cannot decode it"


def test_a_server_that_computes_everything_itself_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pairing, "FIGURES_TIMEOUT_S", 0.1)
    with (
        pair(Fake(), Fake(fetches=False)) as servers,
        pytest.raises(DwdpConfigError, match=r"no KV blocks from rank 0 .* at h:5600\. .*--dtype"),
    ):
        check_pair(*servers)


def test_a_rank_that_offers_nothing_is_noticed() -> None:
    with (
        pair(Fake(offers=None), Fake()) as servers,
        pytest.raises(DwdpConfigError, match=r"rank 0 .* offers no KV blocks"),
    ):
        check_pair(*servers)


def test_a_server_that_does_not_let_us_in_is_named() -> None:
    with (
        pair(Fake(), Fake(key="k")) as servers,
        pytest.raises(DwdpConfigError, match=r"decode 0 .* answers /v1/models with 401"),
    ):
        check_pair(*servers)
