"""The fake CUDA driver of `csrc/tests/fake_cuda`. NOT A GPU.

The fake keeps the driver's documented rules on host memory: what passes with it is no evidence about
hardware. A process that is started in `fake_cuda_environment()` finds it as `libcuda.so.1`, and no
product code knows of it. On a shell:

    env $(python -m gpu_checks.fake) pytest tests/cuda
    env $(python -m gpu_checks.fake max_delay_us=500 seed=1) python ...
"""

import ctypes
import dataclasses
import functools
import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ROOT = Path(__file__).parents[1]
_SOURCES = _ROOT / "csrc" / "tests" / "fake_cuda"
SIMULATED_ENV = "DWDP_SIMULATED_GPU"
_FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden")


@functools.cache
def fake_cuda_library() -> Path:
    """Compile the fake, unless it is there: `libcuda.so.1` in a folder of its own below `build/`.

    Raises:
        FileNotFoundError: this is no checkout.
    """
    sources = sorted(_SOURCES.glob("*.*"))
    if not sources:
        raise FileNotFoundError(f"no sources in {_SOURCES}: the fake driver needs a checkout")
    compiler = os.environ.get("CXX", "g++")
    made_from = [compiler.encode(), *map(str.encode, _FLAGS)] + [
        path.read_bytes() for path in sources
    ]
    key = hashlib.sha256(b"\0".join(made_from)).hexdigest()[:16]
    target = _ROOT / "build" / f"fake-cuda-{key}" / "libcuda.so.1"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder, target.name)
            units = [str(path) for path in sources if path.suffix == ".cpp"]
            subprocess.run([compiler, *_FLAGS, "-o", str(made), *units], check=True)
            made.replace(target)  # whole or not at all, also where another process compiles it now
    return target


def fake_cuda_variables(**settings: object) -> dict[str, str]:
    """Return the variables that put the fake in front in a process that is started with them.

    Args:
        settings: the fake's settings in lower case, as listed in `fake.h`: `max_delay_us=500`.
    """
    folder = str(fake_cuda_library().parent)
    search = [path for path in os.environ.get("LD_LIBRARY_PATH", "").split(":") if path]
    return {
        "LD_LIBRARY_PATH": ":".join([folder, *(path for path in search if path != folder)]),
        **{f"DWDP_FAKE_CUDA_{name.upper()}": str(value) for name, value in settings.items()},
    }


def fake_cuda_environment(**settings: object) -> dict[str, str]:
    """Return this process's environment with the fake in front; see `fake_cuda_variables`."""
    return {**os.environ, **fake_cuda_variables(**settings)}


def simulated_environment(**settings: object) -> dict[str, str]:
    """Return `fake_cuda_environment`, in which `gpu_checks.accelerator` is the simulated one too."""
    return fake_cuda_environment(**settings) | {SIMULATED_ENV: "1"}


@functools.cache
def fake_driver() -> ctypes.CDLL | None:
    """Return the fake, if this process was started with it."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return driver if hasattr(driver, "dwdp_fake_cuda_live") else None


@dataclasses.dataclass(frozen=True)
class LiveObjects:
    """What a process holds of the fake driver."""

    handles: int
    mappings: int
    reservations: int
    streams: int
    events: int
    graphs: int


def live_objects() -> LiveObjects:
    """Return what this process holds; only the fake driver can say."""
    counts = (ctypes.c_size_t * len(dataclasses.fields(LiveObjects)))()
    driver = fake_driver()
    assert driver is not None, "this process was not started with the fake driver"
    driver.dwdp_fake_cuda_live(counts)
    return LiveObjects(*counts)


@dataclasses.dataclass(frozen=True)
class Counts:
    """What this process has asked of the fake driver so far.

    Args:
        copies: asked for one by one, also while capturing.
        batch_calls: calls of the batch copy.
        batch_copies: copies of all these calls.
        overlapping_copies: of these, with the flag to overlap with compute.
        graph_nodes: nodes of the graph that was captured last.
    """

    copies: int
    batch_calls: int
    batch_copies: int
    overlapping_copies: int
    graph_nodes: int


def counts() -> Counts:
    """Return what was asked; only the fake driver counts."""
    numbers = (ctypes.c_size_t * len(dataclasses.fields(Counts)))()
    driver = fake_driver()
    assert driver is not None, "this process was not started with the fake driver"
    driver.dwdp_fake_cuda_counts(numbers)
    return Counts(*numbers)


@contextmanager
def fake_settings(**settings: object) -> Iterator[None]:
    """While active, this process's fake has other settings; all of `fake.h` but `version`."""
    driver = fake_driver()
    assert driver is not None, "this process was not started with the fake driver"
    try:
        for name, value in settings.items():
            status = driver.dwdp_fake_cuda_set(name.encode(), str(value).encode())
            assert status == 0 and name != "version", f"the fake has no setting {name}"
        yield
    finally:
        for name in settings:
            driver.dwdp_fake_cuda_set(name.encode(), None)


def main() -> None:
    """Print the variables as NAME=VALUE, for `env`; settings are arguments, NAME=VALUE too."""
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    words = [f"{name}={value}" for name, value in fake_cuda_variables(**given).items()]
    if unsafe := [word for word in words if shlex.quote(word) != word]:
        sys.exit(f"cannot be passed through `env $(...)`: {unsafe}")
    print(*words)


if __name__ == "__main__":
    main()
