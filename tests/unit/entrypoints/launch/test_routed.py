"""What a rank does with requests of the router, and that it leaves everybody else's alone."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from vllm_dwdp.entrypoints.launch import routed
from vllm_dwdp.entrypoints.launch.routed import (
    CONTROL_ROUTES,
    CONTROL_URL_ENV,
    ENDING_FILE_ENV,
    RANK_URLS_ENV,
    Routed,
)

URLS = "http://127.0.0.1:8001 http://127.0.0.1:8002"
PIN = [(b"X-Data-Parallel-Rank", b"1")]


class Asked:
    """An application that notes what it is asked, behind our middleware."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(RANK_URLS_ENV, URLS)
        self.scopes: list[Any] = []
        self.sent: list[dict[str, Any]] = []
        self.middleware = Routed(self._application)

    async def _application(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        await receive()

    def ask(self, path: str, headers: list[tuple[bytes, bytes]] = [], **scope: Any) -> str:  # noqa: B006
        """Return the refusal; empty if the application was asked."""
        facts = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode()}

        async def receive() -> dict[str, Any]:
            return {"type": "http.request"}

        async def send(message: dict[str, Any]) -> None:
            self.sent.append(message)

        self.sent.clear()
        asyncio.run(self.middleware(facts | {"headers": headers} | scope, receive, send))
        if not self.sent:
            return ""
        start, body = self.sent
        self.status = start["status"]
        assert dict(start["headers"])[b"content-length"] == str(len(body["body"])).encode()
        error = json.loads(body["body"])["error"]
        kinds = {400: "BadRequestError", 503: "ServiceUnavailableError"}
        assert (error["code"], error["type"]) == (self.status, kinds[self.status])
        return str(error["message"])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    return Asked(monkeypatch)


def test_a_request_of_the_router_arrives_as_it_was_sent(asked: Asked) -> None:
    for kind in ("http", "websocket"):
        assert asked.ask("/routed/v1/completions", type=kind) == ""
        scope = asked.scopes.pop()
        assert (scope["path"], scope["raw_path"]) == ("/v1/completions", b"/v1/completions")


@pytest.mark.parametrize("path", ["/v1/completions", "/routedness", "/routed", "/pause"])
def test_who_addresses_a_rank_itself_meets_vllm_only(asked: Asked, path: str) -> None:
    assert asked.ask(path, PIN) == ""
    assert asked.scopes[0]["path"] == path
    asyncio.run(asked.middleware({"type": "lifespan"}, _nothing, _nothing))
    assert asked.scopes[1] == {"type": "lifespan"}


async def _nothing(*message: object) -> None:
    pass


def test_a_pinned_request_is_told_where_the_ranks_are(asked: Asked) -> None:
    assert asked.ask("/routed/v1/completions", PIN) == (
        "X-data-parallel-rank: 1 is refused here: the router of vllm-dwdp launch chooses the rank of "
        "each request. Every rank is a server of its own. Send what one rank shall serve to its URL, "
        "without that header, and what is for every rank to each of them (launch --control-port opens "
        "a port that does so): rank 0 at http://127.0.0.1:8001, rank 1 at http://127.0.0.1:8002."
    )
    assert not asked.scopes


@pytest.mark.parametrize("path", ["/v1/completions", "/health", "/pause"])
def test_a_launch_that_ends_takes_nothing_new(
    path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(ENDING_FILE_ENV, str(tmp_path / "ending"))
    asked = Asked(monkeypatch)
    assert asked.ask("/routed/v1/models") == ""
    (tmp_path / "ending").touch()
    assert asked.ask(f"/routed{path}", PIN) == "This launch ends, and takes nothing new."
    assert asked.status == 503
    assert asked.ask(path) == "This launch ends, and takes nothing new.", "vLLM would answer badly"
    assert (b"retry-after", b"5") in asked.sent[0]["headers"]
    assert asked.ask("/metrics") == "", "figures are read to the end"
    assert asked.ask("/routed/metrics")


def test_a_control_request_is_told_of_the_control_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONTROL_URL_ENV, "http://127.0.0.1:9")
    refusal = Asked(monkeypatch).ask("/routed/pause")
    assert (
        "what is for every rank to http://127.0.0.1:9, which repeats it on each: rank 0" in refusal
    )


@pytest.mark.parametrize("path", sorted(CONTROL_ROUTES))
def test_control_requests_are_refused_through_the_router(asked: Asked, path: str) -> None:
    refusal = (
        f"POST {path} is refused here: the router of vllm-dwdp launch would pass it to one rank"
    )
    for sent in (path, f"{path}/"):
        assert asked.ask(f"/routed{sent}").startswith(refusal)
        assert asked.ask(f"/routed/api{sent}", root_path="/api").startswith(refusal)
        assert asked.status == 400
    assert not asked.scopes


def test_a_request_without_a_raw_path(asked: Asked) -> None:
    assert asked.ask("/routed/v1/models", raw_path=None) == ""
    assert asked.scopes[0]["path"] == "/v1/models"


def test_the_import_path_is_that_of_the_middleware() -> None:
    assert f"{Routed.__module__}.{Routed.__qualname__}" == routed.MIDDLEWARE
