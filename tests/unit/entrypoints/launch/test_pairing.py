"""A rank and a decode server that must fit, with small real servers that say what theirs would."""

import http.server
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from tests.unit.entrypoints.launch.servers import healthy_server, served
from vllm_dwdp.compat.frontend.nixl import Handshake, Question
from vllm_dwdp.entrypoints.launch import pairing
from vllm_dwdp.entrypoints.launch.pairing import Server, check_pair, facts
from vllm_dwdp.errors import DwdpConfigError

pytestmark = pytest.mark.timeout(60)
OFFERED = {"do_remote_prefill": True, "remote_host": "h", "remote_port": 5600}
HANDSHAKE = Handshake(
    settings_hash="s", engine_id="e", backend="CPU_ATTN", layout="LBNHC", block_bytes=(64, 64)
)


@pytest.fixture(autouse=True)
def silent_side_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairing, "read_handshake", lambda host, port: None)


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
            "/health": "",
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
        if asked["kv_transfer_params"]["do_remote_prefill"]:
            fetches = self.server.says["fetches"]
            self.server.received += fetches is True and 4096
            self._answer("{}", 200 if isinstance(fetches, bool) else fetches)
        else:
            self._answer(json.dumps({"kv_transfer_params": self.server.says["offers"]}))

    def _answer(self, text: str, status: int = 200) -> None:
        self.send_response(401 if self.server.says["key"] else status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def pair(rank: Fake, decode: Fake) -> Iterator[tuple[Server, Server]]:
    with served(rank) as ours, served(decode) as theirs:
        yield Server("rank 0", ours), Server("decode 0", theirs)


def test_a_pair_that_fits() -> None:
    rank, decode = Fake(), Fake()
    with pair(rank, decode) as servers:
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


class _Truncated(http.server.BaseHTTPRequestHandler):
    """Dies in the middle of every answer."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.end_headers()
        self.wfile.write(b"{")

    def log_message(self, *arguments: object) -> None:
        pass


def test_one_that_dies_while_it_answers() -> None:
    with (
        served(http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Truncated)) as url,
        pytest.raises(DwdpConfigError, match="decode 0 .* does not answer /v1/models: Incomplete"),
    ):
        facts(Server("decode 0", url))


def test_one_that_is_no_vllm() -> None:
    with (
        healthy_server() as port,
        pytest.raises(DwdpConfigError, match="decode 0 .* does not say its version, model .* URL"),
    ):
        facts(Server("decode 0", f"http://127.0.0.1:{port}"))


class Channels:
    """What answers at side channels; a port stands for a server."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **of_decode: Any) -> None:
        self.asked: list[tuple[str, int]] = []
        self.questions: list[Question] = []
        self.answers: dict[int, Handshake | None] = {
            5600: HANDSHAKE,
            5700: replace(HANDSHAKE, **of_decode) if of_decode else None,
        }
        self.names: dict[str, tuple[str, str]] = {}
        monkeypatch.setattr(pairing, "FIGURES_TIMEOUT_S", 0.1)
        monkeypatch.setattr(pairing, "read_handshake", self._read)
        monkeypatch.setattr(pairing, "name_differences", self._name)

    def _read(self, host: str, port: int) -> Handshake | None:
        self.asked.append((host, port))
        return self.answers[port]

    def _name(self, question: Question) -> dict[str, tuple[str, str]]:
        self.questions.append(question)
        return self.names


OURS = OFFERED | {"remote_engine_id": "e", "transfer_mode": "pull"}
THEIRS = OURS | {"remote_port": 5700}


def unfit(theirs: object = THEIRS) -> str:
    """Return what is said of a decode server that fetches nothing."""
    with pair(Fake(offers=OURS), Fake(offers=theirs, fetches=False)) as servers:
        with pytest.raises(DwdpConfigError) as refused:
            check_pair(*servers, ("the model", "--max-model-len", "8"))
        return str(refused.value)


@pytest.mark.parametrize(
    ("of_decode", "said"),
    [
        ({"backend": "FLASH"}, "--attention-backend is 'FLASH' there and 'CPU_ATTN' here"),
        ({"layout": "LBHNC"}, "the KV layout .* is 'LBHNC' there and 'LBNHC' here"),
        (
            {"block_bytes": (32, 32)},
            "bytes of a KV block of all layers is '64' there and '128' here",
        ),
    ],
)
def test_what_side_channels_say_names_the_field(
    monkeypatch: pytest.MonkeyPatch, of_decode: dict[str, Any], said: str
) -> None:
    channels = Channels(monkeypatch, **of_decode)
    assert re.search(said, unfit())
    assert channels.asked[-2:] == [("h", 5600), ("h", 5700)]


def test_what_a_hash_hides_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    channels = Channels(monkeypatch, settings_hash="t")
    channels.names = {"--dtype": ("bfloat16", "float16")}
    assert "--dtype is 'float16' there and 'bfloat16' here" in unfit()
    (question,) = channels.questions
    assert question.hashes == ("s", "t")
    assert question.arguments == ("the model", "--max-model-len", "8")
    assert (question.backend, question.cache_dtype, question.transfer_mode) == (
        *("CPU_ATTN", "auto"),
        "pull",
    )


def test_a_backend_that_answers_wrongly_is_refused_though_bytes_arrive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mla = replace(HANDSHAKE, backend="CPU_MLA")
    monkeypatch.setattr(pairing, "read_handshake", lambda host, port: mla)
    decode = Fake(offers=THEIRS)
    with (
        pair(Fake(offers=OURS), decode) as servers,
        pytest.raises(
            DwdpConfigError, match=r"CPU_MLA backend .* other tokens .* without decode servers"
        ),
    ):
        check_pair(*servers)
    assert not decode.asked


def test_the_transfer_mode_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    Channels(monkeypatch)
    said = unfit(THEIRS | {"transfer_mode": "push"})
    assert "NIXL's transfer mode is 'push' there and 'pull' here" in said


def test_a_server_without_the_connector_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    Channels(monkeypatch)
    assert "the kv_connector of --kv-transfer-config is 'none, or another one' there" in unfit(None)


@pytest.mark.parametrize(
    "of_decode", [{}, {"engine_id": "another", "backend": "FLASH"}], ids=["silent", "another"]
)
def test_where_no_side_channel_is_reached_the_candidates_are_named(
    monkeypatch: pytest.MonkeyPatch, of_decode: dict[str, Any]
) -> None:
    """A server on another machine may name `localhost`, where another one answers."""
    Channels(monkeypatch, **of_decode)
    said = unfit()
    assert re.search(r"no KV blocks from rank 0 .* at h:5600\. .*--dtype", said)


def test_a_server_that_answers_with_an_error_instead_of_fetching(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As one does that was not told to compute what it cannot fetch."""
    Channels(monkeypatch, backend="FLASH")
    with (
        pair(Fake(offers=OURS), Fake(offers=THEIRS, fetches=500)) as servers,
        pytest.raises(DwdpConfigError, match="--attention-backend is 'FLASH' there"),
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
