"""Two DWDP engines that compute prompts and a stock engine that decodes them, a process each.

    python -m tests.e2e.disaggregated_engines CASES.json NUMBER OUTPUT

Process 0 and 1 are the ranks, process 2 decodes. What a router would carry is left in files beside the
output: where a rank keeps the KV blocks of a prompt, and that a case is over.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.e2e.engine_process import (
    PROMPTS,
    begin_together,
    close_engine,
    generate,
    make_engine,
    take_place,
)
from vllm_dwdp.entrypoints.launch.disaggregation import (
    CONNECTOR,
    CONSUMER,
    PRODUCER,
    SIDE_CHANNEL_PORT_ENV,
)

NUM_RANKS = 2
WAIT_S = 200
PARAMS = "kv_transfer_params"


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    number, output = int(sys.argv[2]), Path(sys.argv[3])
    with output.open("w") as file:
        for case in cases:
            place = output.parent / case["name"]
            begin_together(place, case | {"begin_s": WAIT_S}, number)
            run = compute_prompts if number < NUM_RANKS else decode
            file.write(json.dumps({"name": case["name"]} | run(case, number, place)) + "\n")
            file.flush()


def settings(case: dict[str, Any], role: str) -> dict[str, Any]:
    """Return the case as `make_engine` takes it, for one side."""
    from vllm.config import KVTransferConfig

    transfer = KVTransferConfig(kv_connector=CONNECTOR, kv_role=role)
    return case | {"engine_args": case.get("engine_args", {}) | {"kv_transfer_config": transfer}}


def compute_prompts(case: dict[str, Any], rank: int, place: Path) -> dict[str, Any]:
    """Compute every second prompt, and keep its blocks until the case is over."""
    ranks = case | {"num_ranks": NUM_RANKS, "dwdp": {"mode": "prefetch"}}
    take_place(ranks, rank)
    os.environ[SIDE_CHANNEL_PORT_ENV] = str(case["side_channel_port"])
    engine = make_engine(settings(ranks, PRODUCER))
    try:
        worker = engine.model_executor.driver_worker.worker
        before = worker.dwdp_status()
        for index in range(rank, len(PROMPTS), NUM_RANKS):
            offered = offer(engine, index)
            new = place.with_suffix(f".new{index}")
            new.write_text(json.dumps(offered))
            new.rename(offer_file(place, index))
        wait_for(over_file(place), engine.step)
        after = worker.dwdp_status()
        fetched = [sum(status["fetched_bytes"].values()) for status in (before, after)]
        return {"fetched_expert_bytes": fetched[1] - fetched[0]}
    finally:
        close_engine(engine)


def offer(engine: Any, index: int) -> dict[str, Any]:
    from vllm import SamplingParams

    asked = {"do_remote_decode": True, "do_remote_prefill": False}
    params = SamplingParams(temperature=0, max_tokens=1, extra_args={PARAMS: asked})
    engine.add_request(f"request-{index}", PROMPTS[index], params)
    offered: dict[str, Any] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            offered = output.kv_transfer_params or offered
    return offered


def decode(case: dict[str, Any], number: int, place: Path) -> dict[str, Any]:
    """Decode all prompts, one after the other, and count the bytes that came for each."""
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats

    received: list[int] = []
    failed: list[str] = []
    record = NixlKVConnectorStats.record_transfer

    def counted(self: Any, telemetry: Any) -> None:
        received.append(telemetry.totalBytes)
        record(self, telemetry)

    NixlKVConnectorStats.record_transfer = counted
    NixlKVConnectorStats.record_failed_transfer = lambda self: failed.append("transfer")
    alone = case | {"num_ranks": 1}
    take_place(alone, 0)
    os.environ[SIDE_CHANNEL_PORT_ENV] = str(case["side_channel_port"] + NUM_RANKS)
    engine = make_engine(settings(alone, CONSUMER))
    try:
        tokens = []
        for index, text in enumerate(PROMPTS):
            wait_for(offer_file(place, index), lambda: None)
            offered = json.loads(offer_file(place, index).read_text())
            tokens.append(generate(engine, index, text, extra_args={PARAMS: offered}))
        return {"tokens": tokens, "received_kv_bytes": received, "failed": failed}
    finally:
        NixlKVConnectorStats.record_transfer = record
        over_file(place).touch()
        close_engine(engine)


def offer_file(place: Path, index: int) -> Path:
    return place.with_suffix(f".offer{index}")


def over_file(place: Path) -> Path:
    return place.with_suffix(".over")


def wait_for(file: Path, meanwhile: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not file.exists():
        assert time.monotonic() < deadline, f"{file.name} did not come"
        meanwhile()
        time.sleep(0.02)


if __name__ == "__main__":
    main()
