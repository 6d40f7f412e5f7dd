"""What the front end decides, and how it reaches the processes of the ranks."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.distributed.endpoint import Endpoint
from vllm_dwdp.distributed.launch import DwdpLaunch, RankSpan
from vllm_dwdp.distributed.meeting import make_abstract_endpoint, parse_endpoint

SECRET = "0123456789abcdef"


@pytest.fixture(params=["unix:///tmp/meet", "abstract:x", "tcp://127.0.0.1:7000"])
def endpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Endpoint:
    if not request.param.startswith("tcp://"):
        return parse_endpoint(request.param)
    secret = tmp_path / "secret"
    secret.touch(mode=0o600)
    secret.write_text(SECRET)
    made = parse_endpoint(request.param, 2, str(secret))
    secret.unlink()
    return made


def launch_at(endpoint: Endpoint) -> DwdpLaunch:
    config = DwdpConfig(group_size=2)
    return DwdpLaunch(config=config, ranks=RankSpan(4, 2, 8), endpoint=endpoint)


def test_a_front_end_in_the_middle_knows_the_seats_of_its_ranks() -> None:
    launch = launch_at(make_abstract_endpoint())
    assert [seat.rank for seat in launch.seats] == [4, 5]
    assert [seat.group for seat in launch.seats] == [2, 2]
    assert [seat.dwdp_rank for seat in launch.seats] == [0, 1]
    assert launch.seat(5) == launch.seats[1]


def test_workers_of_one_tensor_rank_are_a_group() -> None:
    launch = replace(launch_at(make_abstract_endpoint()), tensor_parallel_size=3)
    places = [(seat.rank, seat.group, seat.dwdp_rank, seat.tensor_slice) for seat in launch.seats]
    assert places == [
        (4, 6, 0, "0 of 3"),
        (4, 7, 0, "1 of 3"),
        (4, 8, 0, "2 of 3"),
        (5, 6, 1, "0 of 3"),
        (5, 7, 1, "1 of 3"),
        (5, 8, 1, "2 of 3"),
    ]
    everybody = launch.all_seats
    assert len({(seat.group, seat.dwdp_rank) for seat in everybody}) == len(everybody) == 24
    for group in range(12):
        members = [seat for seat in everybody if seat.group == group]
        assert [seat.dwdp_rank for seat in members] == [0, 1]
        assert len({seat.tensor_rank for seat in members}) == 1
    slots = [slot for rank in range(8) for slot in launch.seat(rank).core_slots]
    assert slots == list(range(24)) and launch.seat(0).num_core_slots == 24
    assert launch.seats[4].name == "5 (tensor rank 1)"
    assert launch_at(make_abstract_endpoint()).seats[1].name == "5"


def test_a_launch_reaches_another_process_as_it_is(endpoint: Endpoint) -> None:
    """The secret file may be gone by then: it was read once, by the front end."""
    launch = launch_at(endpoint)
    pickled = pickle.dumps(launch)
    assert pickle.loads(pickled) == launch
    assert pickle.dumps(pickle.loads(pickled)) == pickled
    assert str(pickle.loads(pickled).endpoint) == str(endpoint)
    assert hash(pickle.loads(pickled)) == hash(launch)


def test_whom_a_process_has_reached_stays_its_own(endpoint: Endpoint) -> None:
    before = pickle.dumps(endpoint)
    with endpoint.listen(0, 0):
        connection = endpoint.connect(0, 0, timeout_s=0.2)
        if connection is not None:
            connection.close()
    assert pickle.dumps(endpoint) == before


def test_the_secret_shows_nowhere(endpoint: Endpoint) -> None:
    launch = launch_at(endpoint)
    shown = (repr(launch), str(launch), repr(launch.seats), str(endpoint), repr(endpoint))
    assert not any(SECRET in text for text in shown)


def test_endpoints_cannot_be_guessed() -> None:
    assert make_abstract_endpoint() != make_abstract_endpoint()
    assert len(str(make_abstract_endpoint())) > 32
