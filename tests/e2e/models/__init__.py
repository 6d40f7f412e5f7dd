"""The table of models: every architecture of vLLM's registry that has experts, and what is known of it.

`MODELS` have a small checkpoint and are run. `UNTRIED` have none, and why is said.
"""

from gpu_checks.checkpoints import NAMES
from tests.e2e.models.model import Model
from tests.e2e.models.multimodal import MULTIMODAL
from tests.e2e.models.text import TEXT
from tests.helpers.missing_kernels import STAND_INS

__all__ = ["MODELS", "UNTRIED", "Model"]

MODELS: dict[str, Model] = TEXT | MULTIMODAL
"""By name."""

assert {model.checkpoint or name for name, model in MODELS.items()} <= NAMES
assert {name for model in MODELS.values() for name in model.stand_ins} <= set(STAND_INS)

UNTRIED: dict[str, str] = {
    "TransformersMoEEmbeddingModel": "vLLM converts the causal model to embed: nothing reaches it",
    "EmbeddingGemma2Model": "vLLM builds no experts for it: its text model is dense, whatever its "
    "config says. It shares code for pictures and sound with Gemma-4, which has experts",
}
"""Architectures without a checkpoint here, and why."""
