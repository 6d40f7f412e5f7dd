"""The GPU tests without pytest: `python3 -m tests.gpu [--only NAME ...] [--skip NAME ...]`.

One line per scenario, the end of its output where it fails, exit status 1 if one failed or none ran.
Writes each output to $OUT/gpu-tests.log if that is set.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from tests.gpu.running import run_scenario, why_not
from tests.gpu.scenarios import SCENARIOS


def main() -> int:
    parser = argparse.ArgumentParser(description="The GPU tests without pytest.")
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--skip", nargs="+", choices=SCENARIOS, default=[])
    parser.add_argument("--budget-s", type=float, default=560, help="start nothing after this")
    options = parser.parse_args()
    started = time.monotonic()
    log = Path(os.environ["OUT"], "gpu-tests.log") if "OUT" in os.environ else None
    passed, failed, skipped = 0, [], 0
    for name in [name for name in options.only if name not in options.skip]:
        for argument in SCENARIOS[name]:
            title = f"{name} {argument}".strip()
            reason = why_not(name)
            if time.monotonic() - started > options.budget_s:
                reason = "the budget of time is spent"
            if reason:
                skipped += 1
                print(f"skip {title}: {reason}", flush=True)
                continue
            begun = time.monotonic()
            good, output = run_scenario(name, argument)
            passed += good
            print(
                f"{'ok  ' if good else 'FAIL'} {title} ({time.monotonic() - begun:.0f} s)",
                flush=True,
            )
            if log is not None:
                with log.open("a") as file:
                    file.write(f"=== {title}: {'ok' if good else 'FAIL'}\n{output}\n")
            if not good:
                failed.append(title)
                for line in output.strip().splitlines()[-15:]:
                    print(f"     | {line[:400]}", flush=True)
    print(f"{passed} passed, {len(failed)} failed, {skipped} skipped; failed: {failed}")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
