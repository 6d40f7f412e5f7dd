"""Operations that vLLM has for GPUs only, in torch, so that the models that need one run on a CPU.

Each of `STAND_INS` puts its sentences in the place of one operation, in stock engines and in
ours alike; layers, loaders, routing modules and schedulers stay vLLM's. `FAULTS` are vLLM's own on
every device, which are mended likewise. `environment` names those that a program and every process
of its engines shall have: a vLLM plugin in `kernel_plugins/` calls `install` there.
"""

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.helpers.missing_kernels.delta import (
    bounded_delta_attention,
    delta_attention,
    delta_attention_of_ready_gates,
)
from tests.helpers.missing_kernels.experts import experts_without_a_gate
from tests.helpers.missing_kernels.faults import the_names_of_experts
from tests.helpers.missing_kernels.latents import blocks_of_latents, caches_of_latents
from tests.helpers.missing_kernels.ngrams import ids_of_ngrams
from tests.helpers.missing_kernels.plans import plans_of_all_layers
from tests.helpers.missing_kernels.pools import pools_of_keys
from tests.helpers.missing_kernels.rotary import the_rotary_embedding
from tests.helpers.missing_kernels.routing import routing_by_sigmoid, zero_experts
from tests.helpers.missing_kernels.sparse import sparse_attention
from tests.helpers.missing_kernels.states import (
    linear_attention,
    mamba_1,
    the_convolution_of_one_token,
)

ROOT = Path(__file__).parents[3]
PLUGINS = Path(__file__).parent.with_name("kernel_plugins")
NAMES = "DWDP_TEST_STAND_INS"
"""The environment variable that lists stand-ins, with commas between them."""

FAULTS: dict[str, Callable[[], None]] = {each.__name__: each for each in (the_names_of_experts,)}
STAND_INS: dict[str, Callable[[], None]] = FAULTS | {
    each.__name__: each
    for each in (
        routing_by_sigmoid,
        zero_experts,
        experts_without_a_gate,
        the_convolution_of_one_token,
        mamba_1,
        linear_attention,
        delta_attention,
        bounded_delta_attention,
        delta_attention_of_ready_gates,
        blocks_of_latents,
        caches_of_latents,
        sparse_attention,
        pools_of_keys,
        the_rotary_embedding,
        plans_of_all_layers,
        ids_of_ngrams,
    )
}


def environment(names: tuple[str, ...], others: Mapping[str, str]) -> dict[str, str]:
    """Return what makes a started program and all its engines' processes have these stand-ins.

    Args:
        others: variables that it gets beside; what they say of PYTHONPATH stays true.
    """
    found = others.get("PYTHONPATH", os.environ.get("PYTHONPATH"))
    places = [str(ROOT), str(PLUGINS), *filter(None, [found])]
    return {**others, "PYTHONPATH": os.pathsep.join(places), NAMES: ",".join(names)}


def said(names: tuple[str, ...]) -> str:
    """Return what a row of a table says of a model that ran with them."""
    kinds = {
        "in torch": [name for name in names if name not in FAULTS],
        "mended": [name for name in names if name in FAULTS],
    }
    parts = [f"{' and '.join(each)} {how}" for how, each in kinds.items() if each]
    return f"with {', '.join(parts)}".replace("_", " ")


@functools.cache
def install() -> None:
    """Put the stand-ins that the environment names in their places, in this process from now on."""
    for name in filter(None, os.environ.get(NAMES, "").split(",")):
        STAND_INS[name]()
