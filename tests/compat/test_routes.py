"""Every route of vLLM's server is either for any rank, or refused where a router picks the rank.

A route that comes or goes with a new version of vLLM fails here, by name: look whether it changes or
shows the state of an engine, and put it into `CONTROL_ROUTES` or into one of the sets below.
"""

from pathlib import Path

import pytest

from tests.compat.routes import routes, routes_of
from tests.compat.versions import vllm_minor
from vllm_dwdp.entrypoints.launch.routed import CONTROL_ROUTES

pytestmark = pytest.mark.compat

OF_ANY_RANK = {
    *("/v1/completions", "/v1/completions/render", "/v1/completions/derender"),
    *("/v1/chat/completions", "/v1/chat/completions/batch", "/v1/chat/completions/render"),
    *("/v1/chat/completions/derender", "/cohere/v2/chat", "/cohere/v2/chat/render"),
    *("/v1/messages", "/v1/messages/count_tokens", "/v1/messages/render"),
    *("/inference/v1/generate", "/invocations", "/generative_scoring", "/v1/systemone"),
    "/v1/decisions",
    *("/tokenize", "/detokenize", "/pooling", "/classify", "/v1/embeddings", "/v2/embed"),
    *("/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"),
    *(
        "/v1/audio/transcriptions",
        "/v1/audio/translations",
        "/v1/responses",
        "/v1/responses/render",
    ),
}
"""Every rank gives the same answer, or answers for the one request."""
ALIKE_ON_EVERY_RANK = {
    *("/health", "/ping", "/version", "/v1/models", "/tokenizer_info", "/docs", "/get_world_size"),
}
OF_THE_RANK_THAT_WAS_PICKED = {"/server_info", "/load", "/kv_event_sources"}
"""What is shown says which rank it is of, or is about load; docs/operations.md says so."""
STORED_AT_ONE_RANK = {"/v1/responses/{response_id}", "/v1/responses/{response_id}/cancel"}
"""The router asks its ranks for these until one knows the answer."""
OF_OTHER_SERVERS = {
    *("/keys/batch_allocate", "/keys/batch_exists", "/keys/confirm_write", "/keys/get_locations"),
    *("/clear", "/query", "/register", "/rank/{rank}/initialize", "/ready", "/readyz"),
}
"""Of key-value stores, and of vLLM's supervisor of several servers."""
SINCE = {"/v1/decisions": (0, 33)}
"""Routes that older versions of the range do not have, and the first that has each."""


def test_every_route_has_been_looked_at() -> None:
    import vllm

    found = routes_of(Path(vllm.__file__).parent)
    known = set().union(
        CONTROL_ROUTES,
        OF_ANY_RANK,
        ALIKE_ON_EVERY_RANK,
        OF_THE_RANK_THAT_WAS_PICKED,
        STORED_AT_ONE_RANK,
        OF_OTHER_SERVERS,
    )
    known -= {route for route, first in SINCE.items() if vllm_minor() < first}
    assert not found - known, "new routes; look at them"
    assert not known - found, "routes that have gone"


def test_how_routes_are_found() -> None:
    text = (
        '@router.post("/a")\nasync def f(): ...\n'
        'abort_router.add_api_route("/b", f, methods=["POST"])\n'
        '@self.app.get(\n    "/c", include_in_schema=False)\ndef g(): ...\n'
        'requests.get("/d"); app.add_api_route(route.path, f); headers.get("/e")\n'
    )
    assert set(routes(text)) == {"/a", "/b", "/c"}
