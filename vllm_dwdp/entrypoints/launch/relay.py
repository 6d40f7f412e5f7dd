"""Stands between the router and the ranks of a disaggregated launch: a rank's death costs no request.

In its prefill/decode mode vllm-router asks one rank for the prompt, and gives the client an error where
that rank dies; it does not ask another one. It asks this process instead, at a port for each rank: so
it chooses the rank, and sees which ones are healthy. A prompt that its rank does not compute is given
to the next one. What no rank answers at all is left to the decode server, which computes it itself.

A rank's answer says where the KV blocks of one prompt are, and the router hands it to everything that
the decode server makes of a request. So what becomes several sequences is not asked of a rank at all:
of several prompts all but one would decode another prompt's blocks, and of several samples all but the
first would read blocks that are free again. Nor is what asks for log-probabilities of the prompt: vLLM
makes those of fetched tokens out of memory that was never written. The decode server computes these
prompts itself.

The router names the decode server in the id of each request: so a prompt waits here while no decode
server gets requests, and is not computed if its own is refused. The router hears of that at the server's
`door`, which this process opens as well.

A prompt may be asked for twice: computing it has no effect but that its KV blocks are kept for a while,
and blocks that are not fetched are freed when their lease ends.

    python -m vllm_dwdp.entrypoints.launch.relay PORT_0,PORT_1,... URL_OF_RANK_0 URL_OF_RANK_1 ...

It listens on 127.0.0.1; with `--host ADDRESS` elsewhere, for a router in another container, or for the
probe of a kubelet: `GET /relay/alive` at any port makes a round trip through every port. `--decode
PORT=URL` makes a door, which `--compare` opens only to a server that fits the ranks, as launch does.
"""

import argparse
import json
import re
import sys
import threading
from collections.abc import Sequence
from functools import partial

from vllm_dwdp.entrypoints.launch.comparing import begin_comparing
from vllm_dwdp.entrypoints.launch.door import DoorServer, reason_of_all, wait_for_a_server
from vllm_dwdp.entrypoints.launch.hop import HOST, Answer, Hop, HopServer, ask, reason_to_end

ANSWER_TIMEOUT_S = 1800.0
"""As long as the router itself waits."""
NOT_PASSED_ON = ("host", "content-length", "connection", "transfer-encoding")
DECODE = re.compile(r"___decode_addr_.+:(\d+)_[0-9a-f]+$")
"""In the id that vllm-router gives a request: the port of its decode server's door."""
COMPUTE_IT_THERE = Answer(status=200, body=json.dumps({"kv_transfer_params": None}).encode())
"""The answer of a rank that has computed nothing: nothing is to be fetched."""


def is_for_a_rank(body: bytes) -> bool:
    """Whether a decode server makes one sequence of this, and tells nothing of its prompt.

    What we cannot read is for the rank, which refuses it.
    """
    try:
        asked = json.loads(body)
    except ValueError:
        return True
    if not isinstance(asked, dict):
        return True
    prompt = asked.get("prompt")
    is_batch = isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int)
    samples = [asked.get(name) or 1 for name in ("n", "best_of")]
    is_several = is_batch or asked.get("use_beam_search") or any(count != 1 for count in samples)
    tells_of_prompt = asked.get("prompt_logprobs") is not None or asked.get("echo")
    return not (is_several or tells_of_prompt)


def is_refused(request_id: str, host: str) -> bool:
    """Whether no server decodes this request; waits until that is known.

    Args:
        request_id: of vllm-router, which knows this process by a name of its own.
        host: on which the doors listen.
    """
    named = DECODE.search(request_id)
    place = f"{host}:{named[1]}" if named else ""
    if place:
        wait_for_a_server(place)
    return bool(reason_to_end() or (place and reason_of_all(place)))


class RelayServer(HopServer):
    """Listens in the place of one rank.

    Args:
        port: to listen at.
        urls: of all ranks; the first one is asked first.
        host: address to listen on.
    """

    def __init__(self, port: int, urls: Sequence[str], host: str = HOST) -> None:
        self.urls, self.host = tuple(urls), host
        super().__init__(host, port, _Handler)


class _Handler(Hop):
    server: RelayServer

    def _answer_for_server(self) -> None:
        """At the end the router shall not choose the rank."""
        self._answer_health(self.server.urls[0], reason_to_end())

    def do_POST(self) -> None:
        body = self._body()
        if is_refused(self.headers.get("X-Request-Id") or "", self.server.host):
            self._answer(COMPUTE_IT_THERE)  # the door says why not
            return
        headers = {
            name: value for name, value in self.headers.items() if name.lower() not in NOT_PASSED_ON
        }
        failed = None
        for url in self.server.urls if is_for_a_rank(body) else ():
            answer = ask(url, "POST", self.path, body, headers, ANSWER_TIMEOUT_S)
            if answer is not None and answer.status < 500:
                self._answer(answer)
                return
            failed = answer or failed
        self._answer(COMPUTE_IT_THERE if failed is None or reason_to_end() else failed)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse this program's arguments: `host`, `decode` doors, and of each rank a port and a URL."""
    parser = argparse.ArgumentParser(prog="python -m vllm_dwdp.entrypoints.launch.relay")
    parser.add_argument("--host", default=HOST, help="address to listen on (%(default)s)")
    parser.add_argument(
        "--decode",
        action="append",
        default=[],
        type=_door,
        metavar="PORT=URL",
        help="a decode server, and the port at which the router finds it; repeat",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="give a decode server requests once it was seen to fetch what the ranks compute",
    )
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


def _door(text: str) -> tuple[int, str]:
    port, _, url = text.partition("=")
    return int(port), url


def open_doors(host: str, decodes: Sequence[tuple[int, str]]) -> list[DoorServer]:
    """Return the doors of decode servers, given the port of each door and the server's URL."""
    places = {f"{host}:{port}": url for port, url in decodes}
    doors = []
    for port, url in decodes:
        others = {place: other for place, other in places.items() if place != f"{host}:{port}"}
        doors.append(DoorServer(host, port, url, others))
    return doors


def main(arguments: Sequence[str]) -> None:
    """Serve until the process is ended."""
    given = parse(arguments)
    doors = open_doors(given.host, given.decode)
    if given.compare:
        begin_comparing(doors, given.urls, partial(print, flush=True))
    hops: list[HopServer] = [*doors]
    for rank, port in enumerate(given.ports):
        hops.append(RelayServer(port, [*given.urls[rank:], *given.urls[:rank]], given.host))
    for hop in hops:
        hop.beside = hops
    threads = [threading.Thread(target=hop.serve_forever, daemon=True) for hop in hops]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main(sys.argv[1:])
