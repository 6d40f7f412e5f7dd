"""What is known of a model, and the words of its rows: arguments and errors that several have."""

from dataclasses import dataclass, field
from typing import Any

from tests.compat.versions import vllm_minor
from tests.helpers.missing_kernels import said


@dataclass(frozen=True, kw_only=True)
class Model:
    """A checkpoint of a family, and what stock vLLM does with it on CPUs.

    Args:
        row: of docs/models.md.
        architecture: its name in vLLM's registry.
        checkpoint: one of `NAMES`, if it is not called as the model.
        num_experts, overrides: of the checkpoint.
        engine_args: beside those of every test engine.
        asked: what else a case of `engine_process` says, e.g. how it is asked.
        stock_error: what stock vLLM says; empty if it serves the model.
        stand_ins: of `missing_kernels`, with which stock vLLM serves it all the same.
        interpreted: stock vLLM serves it where there is Triton, of which tests have the interpreter.
        needs_torchvision: vLLM or transformers import it for this model.
        window_added: tokens that vLLM keeps beyond the window that the config says.
        on_push: run by `make test` too.
        since: the first vLLM that has the architecture, its first two numbers, if not every tested one.
    """

    row: str
    architecture: str
    checkpoint: str = ""
    num_experts: int = 8
    overrides: dict[str, Any] = field(default_factory=dict)
    engine_args: dict[str, Any] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)
    stock_error: str = ""
    stand_ins: tuple[str, ...] = ()
    interpreted: bool = False
    needs_torchvision: bool = False
    window_added: int = 0
    on_push: bool = False
    since: tuple[int, int] = (0, 0)

    @property
    def is_served(self) -> bool:
        """Whether stock vLLM serves it, if need be with stand-ins or Triton's interpreter."""
        return not self.stock_error or bool(self.stand_ins) or self.interpreted

    @property
    def served_row(self) -> str:
        """The row of what is served, which says what was put in for it."""
        put_in = [said(self.stand_ins)] if self.stand_ins else []
        put_in += ["in Triton's interpreter"] if self.interpreted else []
        return ", ".join([self.row, *put_in])


def since_0_33(error: str, before: str) -> str:
    """Return what stock vLLM says, of whichever version is tested."""
    return error if vllm_minor() >= (0, 33) else before


def model(row: str, architecture: str, **others: Any) -> Model:
    return Model(row=f"{row} ({architecture})", architecture=architecture, **others)


def called(architecture: str) -> dict[str, Any]:
    """Return the argument that lets a checkpoint pass for another architecture."""
    return {"hf_overrides": {"architectures": [architecture]}}


ONE_IMAGE = {
    "limit_mm_per_prompt": {"image": 1, "video": 0, "audio": 0},
    "max_num_batched_tokens": 512,
}
TEXT_ONLY = {"limit_mm_per_prompt": {"image": 0, "video": 0, "audio": 0}}
ARIA_IMAGE = {"max_num_batched_tokens": 512, "mm_processor_kwargs": {"max_image_size": 490}}
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
TRUSTED = {"trust_remote_code": True}
"""For a checkpoint that brings its own configuration."""
NO_WEIGHTS = {"load_format": "dummy"}
"""For one that stock vLLM refuses before it reads any."""
UNCACHED = {"enable_prefix_caching": False}
"""For layers that keep a state, or nothing, of which no block can be shared."""
ONLY_SOFTMAX = 'assert self.scoring_func == "softmax"'
BY_SIGMOID = {"stock_error": ONLY_SOFTMAX, "stand_ins": ("routing_by_sigmoid",)}
ONE_TOKEN = {
    "stock_error": "expect x to be transposed",
    "stand_ins": ("the_convolution_of_one_token",),
}
"""Stock vLLM serves it, but no prompt, or rest of one, of a single token."""
TWO_QUESTIONS = {
    "question_types": [1, 2],
    "question_spans": [[-9, -7], [-7, -5]],
    "option_spans": [[-5, -4], [-4, -3], [-3, -2], [-2, -1], [-1, 0]],
    "option_counts": [3, 2],
}
"""Spans of tokens that count from a prompt's end."""
NO_KERNEL = "'_lib_fn_wrapper' object has no attribute 'get'"
NO_GATE = {
    "stock_error": "is_act_and_mul=False is supported only for CUDA",
    "stand_ins": ("experts_without_a_gate",),
}
NO_BACKEND = "No Unquantized MoE backend supports the deployment configuration"
SPARSE = {
    "stock_error": "Sparse Attention is not supported on CPU",
    "stand_ins": ("sparse_attention",),
}
POOLED = SPARSE | {
    "stand_ins": ("bounded_delta_attention", "sparse_attention", "pools_of_keys"),
}
