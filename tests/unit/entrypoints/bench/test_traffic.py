"""What a benchmark sends, and its figures of what came back."""

import subprocess
import sys
import time
from typing import Any

import psutil
import pytest

from vllm_dwdp.entrypoints.bench.machine import OtherWork
from vllm_dwdp.entrypoints.bench.traffic import (
    Shape,
    figures,
    make_loads,
    read_stream,
)
from vllm_dwdp.planner.simulate import percentile


def test_loads_are_sized_to_the_seconds_asked_for() -> None:
    shape = Shape(seconds=10.0, concurrency=4)
    below, even, skewed, alone = make_loads(shape, 2, per_s=3.0, long_per_s=0.5)
    assert even.streams[0] is not None
    assert even.streams[0].num_prompts == 30
    assert below.streams[0] is not None
    assert below.streams[0].request_rate == 1.5
    assert below.streams[0].num_prompts == 15
    long, ordinary = skewed.streams
    assert long is not None
    assert long.input_tokens == shape.long_input_tokens
    assert long.num_prompts / 0.5 > 1.5 * shape.seconds, "the long prompts outlast the others"
    assert alone.streams == (None, ordinary), "the same requests, and nobody beside them"


def test_work_of_others_is_noticed() -> None:
    ours, theirs = (
        subprocess.Popen([sys.executable, "-c", "while True: pass"], env={"PATH": ""})
        for _ in range(2)
    )
    try:
        counted, not_counted = psutil.Process(ours.pid), psutil.Process(theirs.pid)
        without, everything = OtherWork([counted]), OtherWork([counted, not_counted])
        before, started = not_counted.cpu_times().user, time.monotonic()
        time.sleep(1.5)
        difference = without.cores() - everything.cores()
        cores = (not_counted.cpu_times().user - before) / (time.monotonic() - started)
        # However little of a busy machine it got: that much is seen in one and not in the other.
        assert cores > 0
        assert difference == pytest.approx(cores, abs=0.15)
    finally:
        for process in (ours, theirs):
            process.kill()
            process.wait()


def test_percentiles_are_values_that_were_seen() -> None:
    values = [float(value) for value in range(1, 101)]
    assert (percentile(values, 50), percentile(values, 99), percentile(values, 100)) == (
        50,
        99,
        100,
    )
    assert percentile([7.0], 99) == 7.0
    assert percentile([], 99) == 0.0


def test_figures_are_over_all_requests_of_all_ranks() -> None:
    common: dict[str, Any] = {
        "completed": 2,
        "duration": 2.0,
        "total_input_tokens": 6,
        "total_output_tokens": 4,
    }
    results = [
        read_stream(common | {"ttfts": [0.1, 0.3], "itls": [[0.01, 0.03], [0.02]]}),
        read_stream(common | {"ttfts": [0.2, 0.4], "itls": [[], []]}),
    ]
    found = figures(results)
    assert found["tokens_per_s"] == 10.0
    assert found["ttft_p50_ms"] == pytest.approx(200)
    assert found["itl_p99_ms"] == pytest.approx(30)
    assert found["tpot_p50_ms"] == pytest.approx(20)
    split = figures(results[:1], long_prompts=results[1:])
    assert split["tokens_per_s"] == 10.0
    assert split["ttft_p50_ms"] == pytest.approx(100)
    assert split["long_ttft_p50_ms"] == pytest.approx(200)
