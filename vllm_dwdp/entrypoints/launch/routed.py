"""What a rank of `launch` does with a request that came through the router: an ASGI middleware.

The router picks a rank for each request, and of requests that it does not know it passes on neither the
query nor most headers. So what is meant for one rank, or for all of them, is refused by every rank
alike, in a sentence that names the ranks' own URLs. The router asks a rank below `ROUTED`; a client that
addresses the rank itself does not, and meets vLLM's server as it is.

Runs in the API servers of a rank, by vLLM's option `--middleware`; touches neither vLLM nor the content.
"""

import json
import os
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

Scope = MutableMapping[str, Any]
Send = Callable[[dict[str, Any]], Awaitable[None]]
App = Callable[[Scope, Any, Any], Awaitable[None]]

MIDDLEWARE = "vllm_dwdp.entrypoints.launch.routed.Routed"
"""For vLLM's `--middleware`."""
ROUTED = "/routed"
"""Path below which the router, and no client, asks a rank."""
RANK_URLS_ENV = "DWDP_RANK_URLS"
"""Variable of a rank's environment: the URLs of all ranks, in order, with blanks between them."""
CONTROL_URL_ENV = "DWDP_CONTROL_URL"
"""Variable of a rank's environment: where one request reaches all ranks, if that was asked for."""
ENDING_FILE_ENV = "DWDP_ENDING_FILE"
"""Variable of a rank's environment: a file that is there once the launch is told to end."""
ENDS = "This launch ends, and takes nothing new."
RETRY_AFTER_S = 5
"""After a refusal with 503: another launch may serve by then, or what was refused here."""
UNTIL_THE_END = frozenset({"/metrics"})
"""Routes that a rank serves to clients that address it itself while it ends."""
PIN = b"x-data-parallel-rank"

CONTROL_ROUTES = frozenset(
    {
        *("/pause", "/resume", "/is_paused", "/abort_requests", "/inference/v1/abort_requests"),
        *("/sleep", "/wake_up", "/is_sleeping", "/release_kv_cache_memory"),
        *("/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"),
        *("/collective_rpc", "/start_profile", "/stop_profile"),
        *("/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
        *("/init_weight_transfer_engine", "/shutdown_weight_transfer_engine"),
        *("/start_weight_update", "/start_draft_weight_update", "/update_weights"),
        *("/finish_weight_update", "/update_weight_version", "/weight_info", "/weight_checker"),
        *("/scale_elastic_ep", "/is_scaling_elastic_ep"),
        *("/fault_tolerance/apply", "/fault_tolerance/status"),
    }
)
"""Routes of vLLM's server that change or show the state of an engine, not only of a request."""


class Routed:
    """Middleware that tells the router's requests apart, and refuses those that no router can place."""

    def __init__(self, app: App) -> None:
        self.app = app
        urls = os.environ.get(RANK_URLS_ENV, "").split()
        self.advice = advice(urls, os.environ.get(CONTROL_URL_ENV, ""))
        self.ending_file = os.environ.get(ENDING_FILE_ENV, "")

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Pass on what is no concern of the rank's, as it would have come without the router."""
        if scope["type"] in ("http", "websocket"):
            is_routed = scope["path"].startswith(ROUTED + "/")
            if is_routed:
                take_prefix_off(scope)
            if scope["type"] == "http" and (refusal := self.refusal(scope, is_routed)):
                await _answer(send, *refusal)
                return
        await self.app(scope, receive, send)

    def refusal(self, scope: Scope, is_routed: bool) -> tuple[int, str, str] | None:
        """Status, kind and message of the answer to a request that vLLM shall not see.

        At the end all are refused, also those for health: a router stops sending, and so do clients that
        ask for readiness. vLLM's engine aborts what comes while it drains, and its server answers some
        of that with 200 and no text, and some with 500.
        """
        ends = os.path.exists(self.ending_file)
        if ends and (is_routed or scope["path"] not in UNTIL_THE_END):
            return 503, "ServiceUnavailableError", ENDS
        reason = refusal_of(scope) if is_routed else ""
        return (400, "BadRequestError", f"{reason} {self.advice}") if reason else None


def take_prefix_off(scope: Scope) -> None:
    """Give a request the path that its sender asked for, in place: the access log reads it too."""
    scope["path"] = scope["path"].removeprefix(ROUTED)
    if raw_path := scope.get("raw_path"):
        scope["raw_path"] = raw_path.removeprefix(ROUTED.encode())


def refusal_of(scope: Scope) -> str:
    """Why this request cannot be left to whichever rank the router picks; empty if it can."""
    path = scope["path"].removeprefix(scope.get("root_path", "")).rstrip("/")
    if path in CONTROL_ROUTES:
        return (
            f"{scope['method']} {path} is refused here: the router of vllm-dwdp launch would pass it to "
            "one rank of its choice, without its query."
        )
    pins = [value.decode("latin-1") for name, value in scope["headers"] if name.lower() == PIN]
    if pins:
        return (
            f"X-data-parallel-rank: {pins[0]} is refused here: the router of vllm-dwdp launch chooses "
            "the rank of each request."
        )
    return ""


def advice(urls: Sequence[str], control_url: str) -> str:
    """How to reach one rank, and all of them."""
    ranks = ", ".join(f"rank {rank} at {url}" for rank, url in enumerate(urls))
    to_all = (
        f"to {control_url}, which repeats it on each"
        if control_url
        else "to each of them (launch --control-port opens a port that does so)"
    )
    return (
        "Every rank is a server of its own. Send what one rank shall serve to its URL, without that "
        f"header, and what is for every rank {to_all}: {ranks}."
    )


async def _answer(send: Send, status: int, kind: str, message: str) -> None:
    """Answer in the form of vLLM's own errors."""
    error = {"message": message, "type": kind, "param": None, "code": status}
    body = json.dumps({"error": error}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *([(b"retry-after", str(RETRY_AFTER_S).encode())] if status == 503 else []),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
