"""Models that vLLM knows since 0.33; see `model.Model`."""

from tests.e2e.models.model import NO_KERNEL, NO_WEIGHTS, TRUSTED, UNCACHED, Model, model

SINCE = (0, 33)

NEWER: dict[str, Model] = {
    "alice_ai": model(
        "AliceAI, hybrid",
        "AliceAIForCausalLM",
        engine_args=TRUSTED | NO_WEIGHTS | UNCACHED,
        stock_error=NO_KERNEL,
        since=SINCE,
    ),
    "beam": model(
        "Beam",
        "BeamForCausalLM",
        engine_args=NO_WEIGHTS,
        stock_error="_rms_norm_kernel[",
        since=SINCE,
    ),
    "flint": model(
        "Flint",
        "FlintForCausalLM",
        engine_args=NO_WEIGHTS,
        stock_error="No module named 'flashinfer'",
        since=SINCE,
    ),
    "step5": model(
        "Step-5",
        "Step5ForCausalLM",
        engine_args=NO_WEIGHTS,
        needs_torchvision=True,
        stock_error="Model Runner V1 does not support: Step5",
        since=SINCE,
    ),
}
"""By name."""
