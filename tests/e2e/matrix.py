"""Runs lists of cases in engine processes (`engine_process.py`) and collects what they wrote."""

import json
from pathlib import Path
from typing import Any

from tests.helpers.engines import Fork, fork
from vllm_dwdp.entrypoints.launch.ports import free_ports

DEADLINE_S = 420


def run_cases(
    folder: Path,
    name: str,
    cases: list[dict[str, Any]],
    environment: dict[str, str] | None = None,
    expected_codes: list[int] | None = None,
    only_rank: int | None = None,
    program: str = "tests.e2e.engine_process",
) -> dict[str, list[dict[str, Any]]]:
    """Run `cases` and return, by case name, the results of ranks 0, 1, ... (or of `only_rank`).

    Every rank of a case is a process of its own, a fork of one that has imported vLLM; a process runs
    all its cases one after the other.

    Args:
        program: the module that a process runs.
    """
    num_ranks = max(case.get("num_ranks", 1) for case in cases)
    for case, port in zip(cases, free_ports(len(cases)), strict=True):
        case["port"] = port
    listing = folder / f"{name}.json"
    listing.write_text(json.dumps(cases))
    ranks = range(num_ranks) if only_rank is None else [only_rank]
    outputs = [folder / f"{name}-{rank}.out" for rank in ranks]
    logs = [folder / f"{name}-{rank}.log" for rank in ranks]
    processes: list[Fork] = []
    try:
        for rank, output, log in zip(ranks, outputs, logs, strict=True):
            command = ["-m", program, str(listing), str(rank), str(output)]
            command += [] if only_rank is None else ["alone"]
            processes.append(fork(command, log, environment, rank))
        codes = [process.wait(timeout=DEADLINE_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for code, log, expected in zip(codes, logs, expected_codes or [0] * len(ranks), strict=True):
        assert code == expected, f"{log.name} ended with {code}:\n{log.read_text()[-6000:]}"
    results: dict[str, list[dict[str, Any]]] = {}
    for output in outputs:
        for line in output.read_text().splitlines():
            result = json.loads(line)
            results.setdefault(result["name"], []).append(result)
    return results
