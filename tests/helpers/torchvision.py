"""torchvision beside a CPU torch, for models whose processors prepare images.

PyPI's torchvision is compiled for CUDA. Its library of operators does not load beside a CPU torch, and
its own import then stops at two operators that nothing has declared. `declare` does. The transforms,
which are what processors use, are plain torch; a missing operator that is called says so.
"""

import functools
import os
import sysconfig
from pathlib import Path
from typing import Any

from tests.helpers.environments import environment

ROOT = Path(__file__).parents[2]
PLUGINS = Path(__file__).with_name("torchvision_plugins")
OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
"""Those that `import torchvision` describes to torch whether it has them or not."""


def variables(cache: Path) -> dict[str, str]:
    """Return the environment variables with which a program can import torchvision.

    Args:
        cache: folder that is kept between sessions.

    Raises:
        Unavailable: PyPI has none for this torch, or cannot be reached.
    """
    import torch

    version = torch.__version__.partition("+")[0]
    folder = cache / f"torch-{version}-python-{sysconfig.get_python_version()}"
    python = environment(folder, "torchvision", f"torch=={version}")
    packages = python.parents[1] / "lib" / f"python{sysconfig.get_python_version()}/site-packages"
    places = [str(ROOT), str(PLUGINS), str(packages), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, places))}


@functools.cache
def declare() -> Any:
    """Let torch know the operators, without an implementation, when it has just been imported."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in OPERATORS:
        library.define(operator)
    return library  # they are known for as long as it is kept
