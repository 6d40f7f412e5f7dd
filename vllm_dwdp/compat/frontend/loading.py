"""What vLLM reads once, while libraries and modules are loaded: a fork cannot change it any more.

`expected` predicts what vLLM's front end adds to the environment before it starts an engine process,
so that a process which loads vLLM with it can be forked in place of that one. A wrong prediction costs
the time of an ordinary start and nothing else: `read_differently` is asked before each fork is used.
Imports neither vLLM nor torch.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

READ_WHILE_LOADING = (
    "ATEN_",
    "GOMP_",
    "KMP_",
    "LD_",
    "MALLOC_",
    "MKL_",
    "OMP_",
    "PYTHON",
    "PYTORCH_",
    "TORCH_",
    "TORCHINDUCTOR_",
    "VLLM_LOGGING_",
    "VLLM_PLUGINS",
    "VLLM_TARGET_DEVICE",
)
"""Beginnings of the names of variables that libraries, torch and vLLM read while they are loaded."""

_OPENMP = ("libomp", "libgomp", "libiomp")

MODULES = (
    "vllm.entrypoints.cli.main",
    "vllm.entrypoints.cli.benchmark.main",
    "vllm.entrypoints.cli.collect_env",
    "vllm.entrypoints.cli.download_kernels",
    "vllm.entrypoints.cli.launch",
    "vllm.entrypoints.cli.openai",
    "vllm.entrypoints.cli.preload",
    "vllm.entrypoints.cli.run_batch",
    "vllm.entrypoints.cli.serve",
    "vllm.entrypoints.cli.snapshot",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.distributed.elastic_ep.elastic_execute",
    "vllm.renderers.hf",
)
"""Modules of vLLM that `vllm serve` and an engine on the CPU import. Plugins come in the fork itself."""


def expected(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what vLLM's CPU build adds to `environment` for libraries that engines load.

    It preloads the OpenMP runtime of torch, and an allocator where it brings one.
    """
    preloaded = [environment["LD_PRELOAD"]] if environment.get("LD_PRELOAD") else []
    if not any(name in library for library in preloaded for name in _OPENMP):
        preloaded += _first_of("torch", "../torch.libs/libgomp*.so*", "lib/libgomp*.so*")
    if not any("libtcmalloc" in library for library in preloaded):
        allocator = _first_of("vllm", "libs/libtcmalloc_minimal*.so*", "libs/libtcmalloc.so*")
        preloaded = allocator + preloaded
    added = {"TORCHINDUCTOR_CPP_DYNAMIC_THREADS": "1"}
    return added | ({"LD_PRELOAD": ":".join(preloaded)} if preloaded else {})


def _first_of(package: str, *patterns: str) -> list[str]:
    """Return the first file of a package that matches one of these patterns, in their order."""
    found = importlib.util.find_spec(package)
    for folder in (found and found.submodule_search_locations) or ():
        for pattern in patterns:
            base, rest = Path(folder), pattern
            while rest.startswith("../"):
                base, rest = base.parent, rest.removeprefix("../")
            if files := sorted(base.glob(rest)):
                return [str(files[0])]
    return []


def read_differently(loaded_with: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Names of variables that would be read otherwise now, of those that are read while loading."""
    names = {*loaded_with, *now}
    return sorted(
        name
        for name in names
        if name.startswith(READ_WHILE_LOADING) and loaded_with.get(name) != now.get(name)
    )
