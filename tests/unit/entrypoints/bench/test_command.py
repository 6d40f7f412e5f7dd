"""What `vllm-dwdp bench` refuses before anything starts."""

import os
import subprocess
import sys

import pytest


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vllm_dwdp.entrypoints.cli.main", "bench", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | environment,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rounds", "0"), "--rounds is 0; it must be a whole number of at least 1."),
        (("--model", "/nowhere/model"), "--model /nowhere/model: [Errno 2] No such file"),
        (("--ranks", "1"), "--ranks is 1; it must be a whole number of at least 2."),
        (("--ranks", "4096"), "--ranks 4096 needs as many cores"),
        (("--seconds", "-1"), "--seconds is -1.0; it must be a number above 0."),
        (("--seconds", "nan"), "--seconds is nan; it must be a number"),
        (
            ("--baseline", "magic"),
            "--baseline 'magic' is unknown; known are replica, tp, stock, prefetch, dp-ep, disagg.",
        ),
        (("--baseline", "dp-ep"), "--baseline dp-ep needs GPUs"),
        (("--output", "/proc/nowhere.json"), "--output /proc/nowhere.json cannot be written"),
        (("--png", "/nowhere/b.png"), "--png /nowhere/b.png cannot be written"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(arguments: tuple[str, ...], message: str) -> None:
    ended = run(*arguments)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"vllm-dwdp: {message}"), ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
