"""Triton's interpreter: kernels that vLLM has in Triton run on a CPU, as Python.

Where Triton has a back end for CPUs, vLLM uses it: its second model runner becomes the default, as on
GPUs, and models whose kernels are Triton's run. PyPI's Triton has none. A plugin in `triton_plugins/`
gives it one that compiles nothing, because the interpreter takes every kernel before it is compiled.
"""

import os
import sysconfig
from pathlib import Path

from tests.helpers.environments import environment

ROOT = Path(__file__).parents[3]
PLUGINS = Path(__file__).parent.with_name("triton_plugins")
VERSION = "3.8.0"
"""That of 3.9, which comes with vLLM's requirements, refuses masks that kernels of vLLM have."""


def variables(cache: Path, others: dict[str, str]) -> dict[str, str]:
    """Return the environment variables with which a program and all its engines' processes have it.

    Args:
        cache: folder that is kept between sessions.
        others: variables that it gets beside; what they say of PYTHONPATH stays true.

    Raises:
        Unavailable: PyPI cannot be reached.
    """
    folder = cache / f"triton-{VERSION}-python-{sysconfig.get_python_version()}"
    python = environment(folder, f"triton=={VERSION}", "--no-deps")
    packages = python.parents[1] / "lib" / f"python{sysconfig.get_python_version()}/site-packages"
    found = others.get("PYTHONPATH", os.environ.get("PYTHONPATH"))
    places = [str(ROOT), str(PLUGINS), *filter(None, [found]), str(packages)]
    return others | {"PYTHONPATH": os.pathsep.join(places), "TRITON_INTERPRET": "1"}
