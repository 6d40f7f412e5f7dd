"""The client of the only API server: vLLM's choice of a rank, over what the ranks themselves say."""

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_dwdp.compat.frontend.balancing import OnlyClient

FIRST = 2  # of a hybrid node


@pytest.fixture
def client() -> Any:
    """As its constructor leaves it; there are no engines."""
    made = OnlyClient.__new__(OnlyClient)
    made.client_count, made.eng_start_index = 1, 0
    made.reqs_in_flight, made.engine_inflight, made.streaming_reqs = {}, Counter(), set()
    made.engine_ranks_managed = [FIRST, FIRST + 1]
    made.core_engines = [rank.to_bytes(2, "little") for rank in made.engine_ranks_managed]
    made._said = [[0, 0, 0.0], [0, 0, 0.0]]
    return made


def send(client: Any, name: str, rank: int | None = None) -> int:
    """Return the position of the rank that gets the request."""
    request: Any = SimpleNamespace(
        request_id=name, data_parallel_rank=rank, pooling_params=None, resumable=False
    )
    return int(client.core_engines.index(client.get_core_engine_for_request(request)))


def hear(client: Any, position: int, finished: set[str], **stats: Any) -> None:
    said = SimpleNamespace(num_waiting_reqs=0, num_running_reqs=0, kv_cache_usage=0.0)
    vars(said).update(stats)
    outputs = SimpleNamespace(
        finished_requests=finished,
        engine_index=FIRST + position,
        scheduler_stats=said if stats else None,
    )
    asyncio.run(OnlyClient.process_engine_outputs(client, outputs))


def test_requests_go_where_the_fewest_are(client: Any) -> None:
    chosen = [send(client, str(number)) for number in range(6)]
    assert sorted(chosen) == [0, 0, 0, 1, 1, 1]
    ended = {str(number) for number, position in enumerate(chosen) if position == 1}
    hear(client, 1, ended)
    assert [send(client, f"next {number}") for number in range(3)] == [1, 1, 1]


def test_a_rank_that_says_it_has_more_to_do_gets_less(client: Any) -> None:
    hear(client, 0, set(), num_running_reqs=3)
    assert [send(client, str(number)) for number in range(3)] == [1, 1, 1]


def test_what_was_sent_is_not_counted_twice_where_ranks_say_nothing(client: Any) -> None:
    """`--disable-log-stats`: vLLM's own counts would grow until the coordinator speaks."""
    for number in range(10):
        position = send(client, str(number), rank=0)
        hear(client, position, {str(number)})
    send(client, "pinned", rank=1)
    assert send(client, "free") == 0


def test_independent_ranks_are_woken_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine.core_client import DPLBAsyncMPClient

    def init(self: Any) -> None:
        self.core_engines, self.engines_running = [b"0", b"1"], False

    monkeypatch.setattr(DPLBAsyncMPClient, "__init__", init)
    client = OnlyClient()
    assert client.engines_running
    client._ensure_stats_update_task()  # no coordinator publishes: stock asserts that one does
