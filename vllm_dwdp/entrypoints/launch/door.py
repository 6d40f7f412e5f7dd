"""Stands between the router and one decode server: what that server may not get is refused here.

A decode server that came back may be another one, and gets nothing until it was compared with the ranks
again (`admission`). The router is given the address of this door in its place: so it finds the server
unhealthy meanwhile, and finds it again by itself. What comes nevertheless goes to another decode server,
or is refused with a 503, which the router passes on as it is. Of what a prefill server answers, or of a
server that it cannot reach, it would make a 500. So the door also asks whether the server is
healthy: launch notices a death a moment later.

A request that may pass is redirected (307), and the router follows: no token comes through here.
"""

import contextlib
import http.client
import json
import time
from collections.abc import Mapping
from types import MappingProxyType
from urllib.parse import urlsplit

from vllm_dwdp.entrypoints.launch.admission import ADMITTED, GONE, REFUSED, read_admission
from vllm_dwdp.entrypoints.launch.hop import Answer, Hop, HopServer, reason_to_end, refusal
from vllm_dwdp.entrypoints.launch.server import READY_PATH

HOLD_S = {GONE: 5.0}
"""So long waits a prompt for a decode server that is not there."""
LONGEST_HOLD_S = 60.0
"""And for one that is being compared."""
HOLD_INTERVAL_S = 0.05
SERVES_TIMEOUT_S = 1.0
IS_GONE = f"The decode server is {GONE}, and gets nothing."


def reason_against(place: str) -> str:
    """Why a decode server gets nothing now; empty if it may get requests.

    Args:
        place: host and port of its door.
    """
    state, reason = read_admission().get(place, (ADMITTED, ""))
    return "" if state == ADMITTED else reason or f"The decode server is {state}, and gets nothing."


def reason_of_all(place: str) -> str:
    """Why no decode server gets what is meant for one of them; empty if one may."""
    return "" if ADMITTED in _states(place) else reason_against(place)


def wait_for_a_server(place: str) -> None:
    """Return once a decode server may get requests, this one was refused, or it took too long."""
    begun = time.monotonic()
    while True:
        own, *_ = states = _states(place)
        waited_s = time.monotonic() - begun
        is_late = waited_s > HOLD_S.get(own, LONGEST_HOLD_S)
        if ADMITTED in states or own == REFUSED or is_late:
            return
        time.sleep(HOLD_INTERVAL_S)


def _states(place: str) -> list[str]:
    """Return what all decode servers are, this one first."""
    said = {other: state for other, (state, _) in read_admission().items()}
    return [said.pop(place, ADMITTED), *said.values()]


def is_passed_over(place: str) -> bool:
    """Whether others decode instead: where none does, clients are to wait, or to read the reason."""
    own, *others = _states(place)
    return own != ADMITTED and ADMITTED in others


def serves(url: str) -> bool:
    """Whether a decode server is healthy; one that only takes long to say so is."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(
        place.hostname or "", place.port, timeout=SERVES_TIMEOUT_S
    )
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.connect()
        # Of a process that was killed the kernel accepts connections until its memory is freed.
        with contextlib.suppress(TimeoutError):
            connection.request("GET", READY_PATH)
            with connection.getresponse() as response:
                return response.status == 200
        return True
    return False


def was_computed(body: bytes) -> bool:
    """Whether a rank has computed the prompt of this request, and says where the KV blocks are."""
    try:
        return bool(json.loads(body)["kv_transfer_params"])
    except (ValueError, TypeError, KeyError):
        return False


class DoorServer(HopServer):
    """Listens in the place of one decode server.

    Args:
        host: address to listen on.
        port: to listen at.
        url: of the decode server.
        others: URLs of the other decode servers, by the places of their doors.
    """

    def __init__(
        self, host: str, port: int, url: str, others: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.url, self.others = url, others
        super().__init__(host, port, _Handler)
        self.place = f"{host}:{self.server_port}"

    def find_server(self) -> str:
        """Return the URL of a decode server that takes a request, this one if it can; empty if none."""
        urls = {self.place: self.url, **self.others}
        may = (url for place, url in urls.items() if not reason_against(place))
        return next(filter(serves, may), "")


class _Handler(Hop):
    server: DoorServer

    def _answer_for_server(self) -> None:
        place = self.server.place
        self._answer_health(self.server.url, reason_against(place) if is_passed_over(place) else "")

    def do_POST(self) -> None:
        body = self._body()
        ends = "" if was_computed(body) else reason_to_end()
        url = "" if ends else self.server.find_server()
        if url:
            self._answer(Answer(status=307, headers={"Location": url + self.path}))
        else:
            self._answer(refusal(ends or reason_against(self.server.place) or IS_GONE))
