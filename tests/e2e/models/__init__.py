"""The table of models: every architecture of vLLM's registry that has experts, and what is known of it.

`MODELS` have a small checkpoint and are run. `UNTRIED` have none, and why is said.
"""

from gpu_checks.checkpoints import NAMES
from tests.e2e.models.model import Model
from tests.e2e.models.multimodal import MULTIMODAL
from tests.e2e.models.newer import NEWER
from tests.e2e.models.text import TEXT
from tests.helpers.missing_kernels import STAND_INS

__all__ = ["MODELS", "UNTRIED", "Model"]

MODELS: dict[str, Model] = TEXT | MULTIMODAL | NEWER
"""By name."""

assert {model.checkpoint or name for name, model in MODELS.items()} <= NAMES
assert {name for model in MODELS.values() for name in model.stand_ins} <= set(STAND_INS)

UNTRIED: dict[str, str] = {
    "ClefFlashForJointSchema": "since vLLM 0.33: Qwen3.5's class with the head of Clef-Omni, each of "
    "which is tried",
    "EmbeddingGemma2Model": "vLLM builds no experts for it: its text model is dense, whatever its "
    "config says. It shares code for pictures and sound with Gemma-4, which has experts",
    "MiniCPMOcrForConditionalGeneration": "since vLLM 0.33: MiniCPM-V 4.6, which is tried, with "
    "another processor, which transformers 5.19 does not have",
    "MuseSparkForConditionalGeneration": "since vLLM 0.33: transformers 5.19 has no such model, and "
    "no small checkpoint of its three parts has been made",
    "TransformersMoEForMTP": "since vLLM 0.33: a drafter of the Transformers back end, which serves "
    "nothing alone",
}
"""Architectures without a checkpoint here, and why."""
