"""Stands between the router and the ranks of a disaggregated launch: a rank's death costs no request.

In its prefill/decode mode vllm-router asks one rank for the prompt, and gives the client an error where
that rank dies; it does not ask another one. It asks this process instead, at a port for each rank: so
it chooses the rank, and sees which ones are healthy. A prompt that its rank does not compute is given
to the next one. What no rank answers at all is left to the decode server, which computes it itself.

A rank's answer says where the KV blocks of one prompt are, and the router hands it to everything that
the decode server makes of a request. So what becomes several sequences is not asked of a rank at all:
of several prompts all but one would decode another prompt's blocks, and of several samples all but the
first would read blocks that are free again. The decode server computes these prompts itself.

A decode server that came back gets nothing until it was compared with the ranks again (`admission`). The
router names it in the id of each request, so that its prompts wait here, or are refused.

A prompt may be asked for twice: computing it has no effect but that its KV blocks are kept for a while,
and blocks that nobody fetches are freed when their lease ends.

    python -m vllm_dwdp.entrypoints.launch.relay PORT_0,PORT_1,... URL_OF_RANK_0 URL_OF_RANK_1 ...

It listens on 127.0.0.1; with `--host ADDRESS` elsewhere, for a router in another container.
"""

import argparse
import http.client
import http.server
import json
import os
import re
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from vllm_dwdp.entrypoints.launch.admission import ADMITTED, GONE, REFUSED, read_admission
from vllm_dwdp.entrypoints.launch.routed import ENDING_FILE_ENV

HOST = "127.0.0.1"
HEALTH_TIMEOUT_S = 4.0
ANSWER_TIMEOUT_S = 1800.0
"""As long as the router itself waits."""
NOT_PASSED_ON = ("host", "content-length", "connection", "transfer-encoding")
DECODE = re.compile(r"___decode_addr_(.+)_[0-9a-f]+$")
"""In the id that vllm-router gives a request: the host and port of its decode server."""
HOLD_S = {GONE: 5.0}
"""So long waits a prompt for a decode server that is not there."""
LONGEST_HOLD_S = 60.0
"""And for one that is being compared."""
HOLD_INTERVAL_S = 0.05
ENDS = "This launch ends, and takes nothing new."
COMPUTE_IT_THERE = json.dumps({"kv_transfer_params": None}).encode()
"""The answer of a rank that has computed nothing: nothing is to be fetched."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a rank answered."""

    status: int
    content_type: str
    body: bytes


def ask(
    url: str, method: str, target: str, body: bytes, headers: dict[str, str], timeout_s: float
) -> Answer | None:
    """Ask one rank; None where it gives no answer."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=timeout_s)
    try:
        connection.request(method, target, body, headers)
        response = connection.getresponse()
        return Answer(
            status=response.status,
            content_type=response.getheader("Content-Type") or "application/json",
            body=response.read(),
        )
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def is_one_sequence(body: bytes) -> bool:
    """Whether a decode server makes one sequence of this; what we cannot read is for the rank."""
    try:
        asked = json.loads(body)
    except ValueError:
        return True
    if not isinstance(asked, dict):
        return True
    prompt = asked.get("prompt")
    is_batch = isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int)
    samples = [asked.get(name) or 1 for name in ("n", "best_of")]
    return not (is_batch or asked.get("use_beam_search") or any(count != 1 for count in samples))


def wait_for_decode(request_id: str) -> str:
    """Wait until the decode server of a request may get it; why it may not, empty if it may."""
    named = DECODE.search(request_id)
    begun = time.monotonic()
    while named is not None:
        state, reason = read_admission().get(named[1], (ADMITTED, ""))
        if state == ADMITTED:
            break
        if state == REFUSED:
            return reason
        if time.monotonic() - begun > HOLD_S.get(state, LONGEST_HOLD_S):
            return f"The decode server at {named[1]} gets nothing yet; it is {state}."
        time.sleep(HOLD_INTERVAL_S)
    return ""


def refusal(reason: str) -> Answer:
    """Return a 503 that says why."""
    body = json.dumps({"error": {"message": reason}}).encode()
    return Answer(status=503, content_type="application/json", body=body)


class RelayServer(http.server.ThreadingHTTPServer):
    """Listens in the place of one rank.

    Args:
        port: to listen at.
        urls: of all ranks; the first one is asked first.
        host: address to listen on.
    """

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, port: int, urls: Sequence[str], host: str = HOST) -> None:
        self.urls = tuple(urls)
        super().__init__((host, port), _Handler)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: RelayServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """Health and figures are those of the rank itself."""
        if self._refuses():
            return
        answer = ask(self.server.urls[0], "GET", self.path, b"", {}, HEALTH_TIMEOUT_S)
        self._answer(
            answer
            or Answer(status=503, content_type="text/plain", body=b"the rank does not answer")
        )

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or "0"))
        if self._refuses():
            return
        if reason := wait_for_decode(self.headers.get("X-Request-Id") or ""):
            self._answer(refusal(reason))
            return
        headers = {
            name: value for name, value in self.headers.items() if name.lower() not in NOT_PASSED_ON
        }
        failed = None
        for url in self.server.urls if is_one_sequence(body) else ():
            answer = ask(url, "POST", self.path, body, headers, ANSWER_TIMEOUT_S)
            if answer is not None and answer.status < 500:
                self._answer(answer)
                return
            failed = answer or failed
        self._answer(
            failed or Answer(status=200, content_type="application/json", body=COMPUTE_IT_THERE)
        )

    def _refuses(self) -> bool:
        """At the end the ranks go first: nobody else would refuse what is new."""
        ends = os.path.exists(os.environ.get(ENDING_FILE_ENV, ""))
        if ends:
            self._answer(refusal(ENDS))
        return ends

    def _answer(self, answer: Answer) -> None:
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)

    def log_request(self, code: object = "-", size: object = "-") -> None:
        """Log no request: the ranks do."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse this program's arguments: `host`, and of each rank one of `ports` and of `urls`."""
    parser = argparse.ArgumentParser(prog="python -m vllm_dwdp.entrypoints.launch.relay")
    parser.add_argument("--host", default=HOST, help="address to listen on (%(default)s)")
    parser.add_argument("ports", type=_ports, help="one for each rank, with commas between them")
    parser.add_argument("urls", nargs="+", help="of the ranks, in the same order")
    given = parser.parse_args(arguments)
    if len(given.ports) != len(given.urls):
        parser.error(
            f"{len(given.ports)} ports for {len(given.urls)} ranks: each rank has one port"
        )
    return given


def _ports(text: str) -> list[int]:
    return [int(port) for port in text.split(",")]


def main(arguments: Sequence[str]) -> None:
    """Serve until the process is ended."""
    given = parse(arguments)
    threads = []
    for rank, port in enumerate(given.ports):
        relay = RelayServer(port, [*given.urls[rank:], *given.urls[:rank]], given.host)
        threads.append(threading.Thread(target=relay.serve_forever, daemon=True))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main(sys.argv[1:])
