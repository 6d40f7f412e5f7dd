"""The program behind `benchmarks/benchmark_serving.py`."""

import shlex
import signal
import sys

from vllm_dwdp.entrypoints.bench.serving import PROGRAM, parse, run_serving
from vllm_dwdp.entrypoints.bench.serving_report import show_serving
from vllm_dwdp.entrypoints.files import write_json
from vllm_dwdp.entrypoints.tables import progress, say
from vllm_dwdp.errors import DwdpError


def main() -> None:
    """Run it; what we refuse is one line and exit status 2."""
    command = shlex.join(["python", f"benchmarks/{PROGRAM}", *sys.argv[1:]])
    signal.signal(signal.SIGTERM, _end)  # so that the servers end with us
    try:
        options = parse(sys.argv[1:])
        result = run_serving(
            options,
            command,
            progress,
            lambda found: write_json("--result-filename", options.output, found.as_dict()),
        )
    except DwdpError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        sys.exit(2)
    show_serving(result)
    say(f"written to {options.output}; again: {command}")


def _end(number: int, frame: object) -> None:
    raise SystemExit(128 + number)
