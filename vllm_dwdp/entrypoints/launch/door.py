"""Stands between the router and one decode server: what that server may not get is refused here.

A decode server that came back may be another one, and gets nothing until it was compared with the ranks
again (`admission`). The router is given the address of this door in its place: so it finds the server
unhealthy meanwhile, and finds it again by itself. What comes nevertheless is refused with a 503, which
the router passes on as it is. Of what a prefill server answers it would make a 500.

A request that may pass is redirected (307), and the router follows: no token comes through here.
"""

import json
import time

from vllm_dwdp.entrypoints.launch.admission import ADMITTED, GONE, REFUSED, read_admission
from vllm_dwdp.entrypoints.launch.hop import Answer, Hop, HopServer, reason_to_end, refusal

HOLD_S = {GONE: 5.0}
"""So long waits a prompt for a decode server that is not there."""
LONGEST_HOLD_S = 60.0
"""And for one that is being compared."""
HOLD_INTERVAL_S = 0.05


def reason_against(place: str) -> str:
    """Why a decode server gets nothing now; empty if it may get requests.

    Args:
        place: host and port of its door.
    """
    state, reason = read_admission().get(place, (ADMITTED, ""))
    return "" if state == ADMITTED else reason or f"The decode server is {state}, and gets nothing."


def wait_until_admitted(place: str) -> None:
    """Return once a decode server may get requests, was refused, or was waited for long enough."""
    begun = time.monotonic()
    while True:
        state, _ = read_admission().get(place, (ADMITTED, ""))
        waited_s = time.monotonic() - begun
        if state in (ADMITTED, REFUSED) or waited_s > HOLD_S.get(state, LONGEST_HOLD_S):
            return
        time.sleep(HOLD_INTERVAL_S)


def is_passed_over(place: str) -> bool:
    """Whether others decode instead: where none does, clients are to wait, or to read the reason."""
    states = {other: state for other, (state, _) in read_admission().items()}
    return states.get(place, ADMITTED) != ADMITTED and ADMITTED in states.values()


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
    """

    def __init__(self, host: str, port: int, url: str) -> None:
        self.url = url
        super().__init__(host, port, _Handler)
        self.place = f"{host}:{self.server_port}"


class _Handler(Hop):
    server: DoorServer

    def do_GET(self) -> None:
        place = self.server.place
        self._answer_health(self.server.url, reason_against(place) if is_passed_over(place) else "")

    def do_POST(self) -> None:
        body = self._body()
        ends = "" if was_computed(body) else reason_to_end()
        if reason := ends or reason_against(self.server.place):
            self._answer(refusal(reason))
            return
        self._answer(Answer(status=307, headers={"Location": self.server.url + self.path}))
