"""The table of models: every architecture of vLLM's registry that has experts, and what is known of it.

`MODELS` have a small checkpoint and are run. `UNTRIED` have none: what stands in the way is said.
"""

from dataclasses import dataclass, field
from typing import Any

from gpu_checks.checkpoints import ARCHITECTURES
from gpu_checks.families import FAMILIES, IMAGE_TOKEN
from gpu_checks.published import PUBLISHED
from tests.helpers.missing_kernels import STAND_INS, said


@dataclass(frozen=True, kw_only=True)
class Model:
    """A checkpoint of a family, and what stock vLLM does with it on CPUs.

    Args:
        row: of docs/models.md.
        architecture: its name in vLLM's registry.
        checkpoint: in `ARCHITECTURES` or `FAMILIES`, if it is not called as the model.
        num_experts, overrides: of the checkpoint.
        engine_args: beside those of every test engine.
        asked: what else a case of `engine_process` says, e.g. how it is asked.
        stock_error: what stock vLLM says; empty if it serves the model.
        stand_ins: of `missing_kernels`, with which stock vLLM serves it all the same.
        needs_torchvision: vLLM or transformers import it for this model.
        window_added: tokens that vLLM keeps beyond the window that the config says.
        on_push: run by `make test` too.
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
    needs_torchvision: bool = False
    window_added: int = 0
    on_push: bool = False

    @property
    def is_served(self) -> bool:
        """Whether stock vLLM serves it, if need be with stand-ins."""
        return not self.stock_error or bool(self.stand_ins)

    @property
    def served_row(self) -> str:
        """The row of what is served, which says what was put in for it."""
        return f"{self.row}, {said(self.stand_ins)}" if self.stand_ins else self.row


def _model(row: str, architecture: str, **others: Any) -> Model:
    return Model(row=f"{row} ({architecture})", architecture=architecture, **others)


ONE_IMAGE = {"limit_mm_per_prompt": {"image": 1, "video": 0}, "max_num_batched_tokens": 512}
TEXT_ONLY = {"limit_mm_per_prompt": {"image": 0, "video": 0, "audio": 0}}
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
TRUSTED = {"trust_remote_code": True}
"""For a checkpoint that brings its own configuration."""
NO_WEIGHTS = {"load_format": "dummy"}
"""For one that stock vLLM refuses before it reads any."""
ONLY_SOFTMAX = 'assert self.scoring_func == "softmax"'
BY_SIGMOID = {"stock_error": ONLY_SOFTMAX, "stand_ins": ("routing_by_sigmoid",)}
ONE_TOKEN = {
    "stock_error": "expect x to be transposed",
    "stand_ins": ("the_convolution_of_one_token",),
}
"""Stock vLLM serves it, but no prompt, or rest of one, of a single token."""
NO_SPARSE = "Sparse Attention is not supported on CPU"

MODELS = {
    "qwen3_moe": _model("Qwen3-MoE", "Qwen3MoeForCausalLM"),
    "qwen2_moe": _model("Qwen2-MoE", "Qwen2MoeForCausalLM"),
    "mixtral": _model("Mixtral", "MixtralForCausalLM"),
    "olmoe": _model("OLMoE", "OlmoeForCausalLM"),
    "granite_moe": _model("Granite-3-MoE", "GraniteMoeForCausalLM"),
    "glm4_moe": _model("GLM-4.5", "Glm4MoeForCausalLM"),
    "gpt_oss": _model("gpt-oss", "GptOssForCausalLM"),
    "deepseek_v2": _model("DeepSeek-V2", "DeepseekV2ForCausalLM"),
    "deepseek_v3": _model("DeepSeek-V3, R1", "DeepseekV3ForCausalLM"),
    "kimi_k2": _model("Kimi-K2", "DeepseekV3ForCausalLM"),
    "dbrx": _model("DBRX", "DbrxForCausalLM", stock_error="experts.w13_weight"),
    "afmoe": _model("Trinity (AFMoE)", "AfmoeForCausalLM"),
    "axk1": _model("A.X-K1", "AXK1ForCausalLM"),
    "cohere2_moe": _model("Command-A MoE", "Cohere2MoeForCausalLM", window_added=1),
    "deepseek_v32": _model(
        "DeepSeek-V3.2, sparse attention", "DeepseekV32ForCausalLM", stock_error=NO_SPARSE
    ),
    "ernie4_5_moe": _model("ERNIE-4.5", "Ernie4_5_MoeForCausalLM"),
    "exaone_moe": _model("K-EXAONE", "ExaoneMoeForCausalLM"),
    "gemma4": _model("Gemma-4 26B-A4B", "Gemma4ForCausalLM"),
    "gemma4_shared_kv": _model("Gemma-4, layers that share keys", "Gemma4ForCausalLM"),
    "glm4_moe_lite": _model("GLM-4.7-Flash", "Glm4MoeLiteForCausalLM"),
    "glm_moe_dsa": _model("GLM-5, sparse attention", "GlmMoeDsaForCausalLM", stock_error=NO_SPARSE),
    "granite_moe_hybrid": _model(
        "Granite-4-H, hybrid", "GraniteMoeHybridForCausalLM", on_push=True
    ),
    "granite_moe_shared": _model("Granite-MoE-Shared", "GraniteMoeSharedForCausalLM"),
    "granite_moe_swa": _model("Granite-MoE-SWA", "GraniteMoeSWAForCausalLM"),
    "hy_v3": _model("Hunyuan-3", "HYV3ForCausalLM"),
    "jamba": _model(
        "Jamba, hybrid",
        "JambaForCausalLM",
        stock_error="Dimension out of range",
        stand_ins=("mamba_1",),
    ),
    "kimi_linear": _model(
        "Kimi-Linear, hybrid",
        "KimiLinearForCausalLM",
        engine_args={"enable_prefix_caching": False},
        stock_error="No module named 'cutlass'",
        stand_ins=("delta_attention", "blocks_of_latents", "caches_of_latents"),
    ),
    "lfm2_moe": _model("LFM2-MoE, hybrid", "Lfm2MoeForCausalLM"),
    "laguna": _model("Laguna", "LagunaForCausalLM", **BY_SIGMOID),
    "llama4_text": _model("Llama-4, text", "Llama4ForCausalLM"),
    "mellum": _model("Mellum", "MellumForCausalLM"),
    "minimax_m2": _model("MiniMax-M2", "MiniMaxM2ForCausalLM", **BY_SIGMOID),
    "mimo_v2_flash": _model("MiMo-V2-Flash", "MiMoV2FlashForCausalLM"),
    "nemotron_h": _model(
        "Nemotron-3, hybrid",
        "NemotronHForCausalLM",
        stock_error="is_act_and_mul=False is supported only for CUDA",
        stand_ins=("experts_without_a_gate",),
    ),
    "phimoe": _model("Phi-3.5-MoE", "PhiMoEForCausalLM"),
    "qwen3_next": _model("Qwen3-Next, hybrid", "Qwen3NextForCausalLM", on_push=True),
    "qwen3_vl_moe": _model(
        "Qwen3-VL-MoE, with an image",
        "Qwen3VLMoeForConditionalGeneration",
        engine_args=ONE_IMAGE,
        asked={"image_token": QWEN_IMAGE},
        needs_torchvision=True,
    ),
    "llama4": _model(
        "Llama-4, with an image",
        "Llama4ForConditionalGeneration",
        engine_args={"limit_mm_per_prompt": {"image": 1}, "max_num_batched_tokens": 512},
        asked={"image_token": "<|image|>"},
        needs_torchvision=True,
    ),
    "gemma4_multimodal": _model(
        "Gemma-4 26B-A4B, the multimodal model asked with text",
        "Gemma4ForConditionalGeneration",
        engine_args=TEXT_ONLY,
        needs_torchvision=True,
    ),
    "ernie4_5_vl_moe": _model(
        "ERNIE-4.5-VL, asked with text",
        "Ernie4_5_VLMoeForConditionalGeneration",
        engine_args=TEXT_ONLY | TRUSTED,
        needs_torchvision=True,
        stock_error="Ernie4_5_VLRotaryEmbedding.forward_native() takes from 3 to 4 positional",
        stand_ins=("the_rotary_embedding",),
    ),
    "qwen3_5_moe": _model(
        "Qwen3.5-MoE, text",
        "Qwen3_5MoeForConditionalGeneration",
        engine_args=TEXT_ONLY,
        needs_torchvision=True,
        **ONE_TOKEN,
    ),
    "qwen3_5_moe_image": _model(
        "Qwen3.5-MoE, with an image",
        "Qwen3_5MoeForConditionalGeneration",
        checkpoint="qwen3_5_moe",
        engine_args=ONE_IMAGE,
        asked={"image_token": QWEN_IMAGE},
        needs_torchvision=True,
    ),
    "flex_olmo": _model("FlexOlmo, Transformers back end", "FlexOlmoForCausalLM"),
    "hunyuan_v1_moe": _model("Hunyuan-A13B, Transformers back end", "HunYuanMoEV1ForCausalLM"),
    "olmoe_transformers": _model(
        "OLMoE, --model-impl transformers",
        "TransformersMoEForCausalLM",
        checkpoint="olmoe",
        engine_args={"model_impl": "transformers"},
    ),
    "olmoe_transformers_embeds": _model(
        "OLMoE that embeds, --model-impl transformers",
        "TransformersMoEForCausalLM",
        checkpoint="olmoe",
        engine_args={"model_impl": "transformers", "runner": "pooling", "convert": "embed"},
        asked={"pooling": "embed"},
    ),
    "qwen3_moe_transformers_classifies": _model(
        "Qwen3-MoE that classifies, --model-impl transformers",
        "TransformersMoEForSequenceClassification",
        checkpoint="qwen3_moe_classifier",
        engine_args={"model_impl": "transformers", "runner": "pooling"},
        asked={"pooling": "classify"},
        stock_error="There is no module or parameter named 'score'",
    ),
    "qwen3_5_moe_text": _model(
        "Qwen3.5-MoE, text model alone",
        "Qwen3_5MoeForCausalLM",
        needs_torchvision=True,
        **ONE_TOKEN,
    ),
    "aria": _model(
        "Aria, with an image",
        "AriaForConditionalGeneration",
        engine_args={
            "max_num_batched_tokens": 512,
            "mm_processor_kwargs": {"max_image_size": 490},
        },
        asked={"image_token": IMAGE_TOKEN},
    ),
    "qwen3_moe_embeds": _model(
        "Qwen3-MoE that embeds, --convert embed",
        "Qwen3MoeForCausalLM",
        checkpoint="qwen3_moe",
        engine_args={"runner": "pooling", "convert": "embed"},
        asked={"pooling": "embed"},
        on_push=True,
    ),
    "qwen3_moe_late_interaction": _model(
        "Qwen3-MoE that embeds every token, for late interaction",
        "Qwen3MoeForCausalLM",
        checkpoint="qwen3_moe",
        engine_args={"runner": "pooling", "convert": "embed"},
        asked={"pooling": "token_embed"},
    ),
    "qwen3_moe_classifier": _model(
        "Qwen3-MoE that classifies or rewards",
        "Qwen3MoeForCausalLM",
        engine_args={"runner": "pooling"},
        asked={"pooling": "classify"},
    ),
    "all_experts": _model(
        "Odd shape: every token to all experts",
        "Qwen3MoeForCausalLM",
        checkpoint="qwen3_moe",
        num_experts=4,
        overrides={"num_experts_per_tok": 4},
    ),
    "hy_v4": _model(
        "Hunyuan-4, sparse attention",
        "HYV4ForCausalLM",
        stock_error="no valid sparse MLA backend is available",
    ),
    "minimax_m3": _model(
        "MiniMax-M3, Transformers back end", "TransformersMoEForCausalLM", **BY_SIGMOID
    ),
    "bailing_moe": _model("Ling-lite, Ling-plus", "BailingMoeForCausalLM", engine_args=TRUSTED),
    "bailing_moe_v2": _model("Ling-2.0, Ring-2.0", "BailingMoeV2ForCausalLM", engine_args=TRUSTED),
    "bailing_moe_v2_5": _model(
        "Ling-2.5, hybrid",
        "BailingMoeV2_5ForCausalLM",
        engine_args=TRUSTED | {"enable_prefix_caching": False},
        stock_error="is not supported by attention backend(s): CPU_MLA",
        stand_ins=("blocks_of_latents", "linear_attention"),
    ),
    "deepseek_v4": _model(
        "DeepSeek-V4", "DeepseekV4ForCausalLM", stock_error="_token_request_mapping_kernel["
    ),
    "sarvam_mla": _model("Sarvam-105B", "SarvamMLAForCausalLM", engine_args=TRUSTED),
    "sarvam_moe": _model("Sarvam-30B", "SarvamMoEForCausalLM", engine_args=TRUSTED),
    "param2_moe": _model("Param-2", "Param2MoEForCausalLM", engine_args=TRUSTED),
    "deepseek": _model("DeepSeek-MoE 16B", "DeepseekForCausalLM", engine_args=TRUSTED),
    "pangu_ultra_moe": _model(
        "openPangu-Ultra-MoE", "PanguUltraMoEForCausalLM", engine_args=TRUSTED
    ),
    "pangu_pro_moe_v2": _model(
        "openPangu-Pro-MoE 2",
        "PanguProMoEV2ForCausalLM",
        engine_args=TRUSTED | NO_WEIGHTS,
        stock_error="SinkFullAttentionManager.__init__() got an unexpected keyword argument",
    ),
    "mimo_v2": _model("MiMo-V2", "MiMoV2ForCausalLM", engine_args=TRUSTED),
    "longcat_flash": _model(
        "LongCat-Flash",
        "LongcatFlashForCausalLM",
        stock_error="no attribute 'topk_softmax'",
        stand_ins=("zero_experts",),
    ),
    "step3_text": _model("Step-3, text", "Step3TextForCausalLM"),
    "step3p5": _model("Step-3.5-Flash", "Step3p5ForCausalLM", **BY_SIGMOID),
    "dots3_note": _model(
        "dots.note",
        "Dots3NoteForCausalLM",
        engine_args=NO_WEIGHTS,
        stock_error="failed to be inspected",
    ),
}
"""By name."""

assert {model.checkpoint or name for name, model in MODELS.items()} <= set(
    ARCHITECTURES | FAMILIES | PUBLISHED
)

assert {name for model in MODELS.values() for name in model.stand_ins} <= set(STAND_INS)

_PUBLISHED = "transformers has no such model; its code is published with its weights"
_PROCESSOR = "a small checkpoint needs the files of its processor, which nobody has written"
UNTRIED: dict[str, str] = {
    "BailingMoeV3ForCausalLM": _PUBLISHED,
    "BailingMoeV3VLForConditionalGeneration": _PUBLISHED,
    "ClefOmniForJointSchema": _PUBLISHED,
    "ColQwen3_5": _PUBLISHED,
    "Cosmos3EdgeForConditionalGeneration": _PROCESSOR,
    "DeepseekV41ForCausalLM": _PUBLISHED,
    "DiffusionGemmaForBlockDiffusion": "it generates by diffusion of blocks, which needs a GPU",
    "EmbeddingGemma2Model": "no published one has experts; its text model is Gemma-4's",
    "Gemma4UnifiedForConditionalGeneration": _PROCESSOR,
    "Glm5NextForCausalLM": _PUBLISHED,
    "Glm5NextForConditionalGeneration": _PROCESSOR,
    "InklingForCausalLM": "vLLM wants the special tokens of its own tokenizer",
    "InklingForConditionalGeneration": _PROCESSOR,
    "InternS1ProForConditionalGeneration": _PUBLISHED,
    "InternS2MobiusForConditionalGeneration": _PUBLISHED,
    "InternS2PreviewForConditionalGeneration": _PUBLISHED,
    "JambaForSequenceClassification": "its text model is Jamba",
    "K2HorizonForCausalLM": _PUBLISHED,
    "KimiK3ForConditionalGeneration": _PUBLISHED,
    "LongcatFlashNgramForCausalLM": _PUBLISHED,
    "MiMoV2OmniForCausalLM": _PUBLISHED,
    "MiniCPMV4_6ForConditionalGeneration": _PROCESSOR,
    "MiniCPMV4_7ForConditionalGeneration": _PROCESSOR,
    "MiniMaxM3SparseForCausalLM": "nobody has made a small checkpoint as published ones are",
    "MiniMaxM3SparseForConditionalGeneration": _PROCESSOR,
    "MistralLarge3ForCausalLM": "Mistral's own format; its layers are DeepSeek-V3's",
    "NemotronH_Nano_Omni_Reasoning_V3": _PUBLISHED,
    "NemotronH_Nano_VL_V2": _PUBLISHED,
    "NemotronH_Omni_Reasoning_V3": _PROCESSOR,
    "NemotronH_Super_Omni_Reasoning_V3": _PUBLISHED,
    "OpenAIPrivacyFilterForTokenClassification": "it labels tokens; its layers are gpt-oss'",
    "PanguEmbeddedForCausalLM": "published ones have no experts",
    "Qwen3OmniMoeForConditionalGeneration": _PROCESSOR,
    "Qwen3_5ForCausalLM": "published ones have no experts",
    "Qwen3_5ForConditionalGeneration": "published ones have no experts",
    "Qwen4ExpForCausalLM": "no small checkpoint has been made of it",
    "Qwen4ExpForConditionalGeneration": _PROCESSOR,
    "TransformersMoEEmbeddingModel": "vLLM converts the causal model to embed",
    "TransformersMultiModalMoEForCausalLM": "no run of a model with images by it was seen to end",
}
"""Architectures without a checkpoint here, and why."""
