"""An environment of its own with zentorch, which changes what vLLM runs on AMD processors."""

import sysconfig
from pathlib import Path

from tests.helpers.environments import Unavailable, environment

NEEDED = ("deprecated", "wrapt")
"""What zentorch imports and the environment of the tests need not have."""


def interpreter(cache: Path) -> Path:
    """Return the Python of an environment with zentorch for the torch of the tests.

    Args:
        cache: folder that is kept between sessions.

    Raises:
        Unavailable: the processor is another, or PyPI has none or cannot be reached.
    """
    import torch
    from vllm.platforms import _is_amd_zen_cpu

    if not _is_amd_zen_cpu():
        raise Unavailable("zentorch is for AMD processors with AVX-512, and this is none")
    version = torch.__version__.partition("+")[0]
    folder = cache / f"torch-{version}-python-{sysconfig.get_python_version()}"
    return environment(folder, "--no-deps", f"zentorch=={version}.*", *NEEDED)
