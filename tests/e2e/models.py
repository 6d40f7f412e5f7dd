"""The table of models: every architecture of vLLM's registry that has experts, and what is known of it.

`MODELS` have a small checkpoint and are run. `UNTRIED` have none, and why is said.
"""

from dataclasses import dataclass, field
from typing import Any

from gpu_checks.checkpoints import NAMES
from gpu_checks.multimodal import IMAGE_TOKEN


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
    needs_torchvision: bool = False
    window_added: int = 0
    on_push: bool = False


def _model(row: str, architecture: str, **others: Any) -> Model:
    return Model(row=f"{row} ({architecture})", architecture=architecture, **others)


def called(architecture: str) -> dict[str, Any]:
    """Return the argument that lets a checkpoint pass for another architecture."""
    return {"hf_overrides": {"architectures": [architecture]}}


ONE_IMAGE = {"limit_mm_per_prompt": {"image": 1, "video": 0}, "max_num_batched_tokens": 512}
TEXT_ONLY = {"limit_mm_per_prompt": {"image": 0, "video": 0, "audio": 0}}
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
TRUSTED = {"trust_remote_code": True}
"""For a checkpoint that brings its own configuration."""
NO_WEIGHTS = {"load_format": "dummy"}
"""For one that stock vLLM refuses before it reads any."""
UNCACHED = {"enable_prefix_caching": False}
"""For layers that keep a state, or nothing, of which no block can be shared."""
ONLY_SOFTMAX = 'assert self.scoring_func == "softmax"'
TWO_QUESTIONS = {
    "question_types": [1, 2],
    "question_spans": [[-9, -7], [-7, -5]],
    "option_spans": [[-5, -4], [-4, -3], [-3, -2], [-2, -1], [-1, 0]],
    "option_counts": [3, 2],
}
"""Spans of tokens that count from a prompt's end."""
NO_KERNEL = "'_lib_fn_wrapper' object has no attribute 'get'"
UNGATED = "is_act_and_mul=False is supported only for CUDA"
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
    "jamba": _model("Jamba, hybrid", "JambaForCausalLM", stock_error="Dimension out of range"),
    "kimi_linear": _model(
        "Kimi-Linear, hybrid",
        "KimiLinearForCausalLM",
        engine_args=UNCACHED,
        stock_error=NO_KERNEL,
    ),
    "lfm2_moe": _model("LFM2-MoE, hybrid", "Lfm2MoeForCausalLM"),
    "laguna": _model("Laguna", "LagunaForCausalLM", stock_error=ONLY_SOFTMAX),
    "llama4_text": _model("Llama-4, text", "Llama4ForCausalLM"),
    "mellum": _model("Mellum", "MellumForCausalLM"),
    "minimax_m2": _model("MiniMax-M2", "MiniMaxM2ForCausalLM", stock_error=ONLY_SOFTMAX),
    "mimo_v2_flash": _model("MiMo-V2-Flash", "MiMoV2FlashForCausalLM"),
    "nemotron_h": _model(
        "Nemotron-3, hybrid",
        "NemotronHForCausalLM",
        stock_error=UNGATED,
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
    ),
    "qwen3_5_moe": _model(
        "Qwen3.5-MoE, text",
        "Qwen3_5MoeForConditionalGeneration",
        engine_args=TEXT_ONLY,
        needs_torchvision=True,
        stock_error="expect x to be transposed",
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
        "TransformersMoEEmbeddingModel",
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
        stock_error="expect x to be transposed",
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
    "minimax_m3": _model("MiniMax-M3", "MiniMaxM3SparseForCausalLM", stock_error=ONLY_SOFTMAX),
    "bailing_moe": _model("Ling-lite, Ling-plus", "BailingMoeForCausalLM", engine_args=TRUSTED),
    "bailing_moe_v2": _model("Ling-2.0, Ring-2.0", "BailingMoeV2ForCausalLM", engine_args=TRUSTED),
    "bailing_moe_v2_5": _model(
        "Ling-2.5, hybrid",
        "BailingMoeV2_5ForCausalLM",
        engine_args=TRUSTED | NO_WEIGHTS | UNCACHED,
        stock_error="is not supported by attention backend(s): CPU_MLA",
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
        "LongCat-Flash", "LongcatFlashForCausalLM", stock_error="no attribute 'topk_softmax'"
    ),
    "step3_text": _model("Step-3, text", "Step3TextForCausalLM"),
    "step3p5": _model("Step-3.5-Flash", "Step3p5ForCausalLM", stock_error=ONLY_SOFTMAX),
    "dots3_note": _model(
        "dots.note",
        "Dots3NoteForCausalLM",
        engine_args=NO_WEIGHTS,
        stock_error="failed to be inspected",
    ),
    "bailing_moe_v3": _model(
        "Ling-3, hybrid",
        "BailingMoeV3ForCausalLM",
        engine_args=TRUSTED | NO_WEIGHTS | UNCACHED,
        stock_error="is not supported by attention backend(s): CPU_MLA",
    ),
    "bailing_moe_v3_vl": _model(
        "Ling-3-VL, hybrid",
        "BailingMoeV3VLForConditionalGeneration",
        engine_args=TEXT_ONLY | NO_WEIGHTS | UNCACHED,
        needs_torchvision=True,
        stock_error="is not supported by attention backend(s): CPU_MLA",
    ),
    "longcat_flash_ngram": _model(
        "LongCat-Flash-Lite",
        "LongcatFlashNgramForCausalLM",
        engine_args=NO_WEIGHTS,
        stock_error="requires the V2 model runner",
    ),
    "glm5_next_text": _model(
        "GLM-5.3-Flash, text",
        "Glm5NextForCausalLM",
        engine_args=NO_WEIGHTS | UNCACHED,
        needs_torchvision=True,
        stock_error=NO_SPARSE,
    ),
    "glm5_next": _model(
        "GLM-5.3-Flash",
        "Glm5NextForConditionalGeneration",
        engine_args=TEXT_ONLY | NO_WEIGHTS | UNCACHED,
        needs_torchvision=True,
        stock_error=NO_SPARSE,
    ),
    "qwen4_exp_text": _model(
        "Qwen4-Exp, text",
        "Qwen4ExpForCausalLM",
        engine_args=NO_WEIGHTS,
        needs_torchvision=True,
        stock_error="_grouped_gemma_rmsnorm_kernel[",
    ),
    "qwen4_exp": _model(
        "Qwen4-Exp",
        "Qwen4ExpForConditionalGeneration",
        engine_args=TEXT_ONLY | NO_WEIGHTS,
        needs_torchvision=True,
        stock_error="_grouped_gemma_rmsnorm_kernel[",
    ),
    "inkling_text": _model(
        "Inkling, text",
        "InklingForCausalLM",
        engine_args=NO_WEIGHTS,
        stock_error="_seq_metadata_kernel[",
    ),
    "inkling": _model(
        "Inkling",
        "InklingForConditionalGeneration",
        engine_args=TEXT_ONLY | NO_WEIGHTS,
        stock_error=NO_KERNEL,
    ),
    "deepseek_v41": _model(
        "DeepSeek-V4.1",
        "DeepseekV41ForCausalLM",
        engine_args=TEXT_ONLY | NO_WEIGHTS,
        stock_error="attention requires a CUDA device",
    ),
    "kimi_k3": _model(
        "Kimi-K3",
        "KimiK3ForConditionalGeneration",
        engine_args=TEXT_ONLY | NO_WEIGHTS | UNCACHED,
        needs_torchvision=True,
        stock_error=NO_KERNEL,
    ),
    "nemotron_h_omni": _model(
        "Nemotron-3-Omni",
        "NemotronH_Omni_Reasoning_V3",
        engine_args=TEXT_ONLY | NO_WEIGHTS,
        needs_torchvision=True,
        stock_error=UNGATED,
    ),
    "diffusion_gemma": _model(
        "DiffusionGemma",
        "DiffusionGemmaForBlockDiffusion",
        engine_args=TEXT_ONLY | NO_WEIGHTS,
        needs_torchvision=True,
        stock_error="Model Runner V1 does not support: diffusion models",
    ),
    "mimo_v2_omni": _model(
        "MiMo-V2-Omni",
        "MiMoV2OmniForCausalLM",
        engine_args=TEXT_ONLY | TRUSTED,
        needs_torchvision=True,
    ),
    "cosmos3_edge": _model(
        "Cosmos3-Edge",
        "Cosmos3EdgeForConditionalGeneration",
        engine_args=TEXT_ONLY | NO_WEIGHTS,
        needs_torchvision=True,
        stock_error="Cosmos3 Edge only supports attention",
    ),
    "interns2_preview": _model(
        "Intern-S2-Preview, text, without linear attention",
        "InternS2PreviewForConditionalGeneration",
        checkpoint="qwen3_5_moe_full",
        engine_args=TEXT_ONLY | UNCACHED | called("InternS2PreviewForConditionalGeneration"),
        needs_torchvision=True,
    ),
    "qwen3_5": _model(
        "Qwen3.5, given experts, text, without linear attention",
        "Qwen3_5ForConditionalGeneration",
        checkpoint="qwen3_5_moe_full",
        engine_args=TEXT_ONLY | UNCACHED | called("Qwen3_5ForConditionalGeneration"),
        needs_torchvision=True,
    ),
    "qwen3_5_text": _model(
        "Qwen3.5, given experts, text model alone, without linear attention",
        "Qwen3_5ForCausalLM",
        checkpoint="qwen3_5_moe_text_full",
        engine_args=UNCACHED | called("Qwen3_5ForCausalLM"),
        needs_torchvision=True,
    ),
    "interns2_mobius": _model(
        "Intern-S2-Mobius, text, without linear attention: layers that share their experts",
        "InternS2MobiusForConditionalGeneration",
        engine_args=TEXT_ONLY | TRUSTED | UNCACHED,
        needs_torchvision=True,
    ),
    "interns1_pro": _model(
        "Intern-S1-Pro, text",
        "InternS1ProForConditionalGeneration",
        engine_args=TEXT_ONLY | TRUSTED,
        needs_torchvision=True,
        stock_error="object has no attribute 'model_config'",
    ),
    "k2_horizon": _model(
        "K2-Horizon, routed by softmax, no mixture of values",
        "K2HorizonForCausalLM",
        engine_args=TRUSTED,
    ),
    "k2_horizon_values": _model(
        "K2-Horizon, mixture of values",
        "K2HorizonForCausalLM",
        engine_args=TRUSTED | NO_WEIGHTS,
        stock_error="Dimension out of range",
    ),
    "pangu_embedded": _model(
        "openPangu-Embedded, given experts", "PanguEmbeddedForCausalLM", engine_args=TRUSTED
    ),
    "nemotronh_super_omni_reasoning_v3": _model(
        "Nemotron-3-Super-Omni",
        "NemotronH_Super_Omni_Reasoning_V3",
        checkpoint="nemotron_h_omni",
        engine_args=TEXT_ONLY | NO_WEIGHTS | called("NemotronH_Super_Omni_Reasoning_V3"),
        needs_torchvision=True,
        stock_error=UNGATED,
    ),
    "nemotronh_nano_omni_reasoning_v3": _model(
        "Nemotron-3-Nano-Omni",
        "NemotronH_Nano_Omni_Reasoning_V3",
        checkpoint="nemotron_h_omni",
        engine_args=TEXT_ONLY | NO_WEIGHTS | called("NemotronH_Nano_Omni_Reasoning_V3"),
        needs_torchvision=True,
        stock_error=UNGATED,
    ),
    "nemotronh_nano_vl_v2": _model(
        "Nemotron-Nano-VL 2",
        "NemotronH_Nano_VL_V2",
        checkpoint="nemotron_h_omni",
        engine_args=TEXT_ONLY | NO_WEIGHTS | called("NemotronH_Nano_VL_V2"),
        needs_torchvision=True,
        stock_error=UNGATED,
    ),
    "qwen3_vl_moe_transformers": _model(
        "Qwen3-VL-MoE, text, --model-impl transformers",
        "TransformersMultiModalMoEForCausalLM",
        checkpoint="qwen3_vl_moe_saved",
        engine_args=TEXT_ONLY | {"model_impl": "transformers"},
        needs_torchvision=True,
    ),
    "qwen3_vl_moe_transformers_image": _model(
        "Qwen3-VL-MoE, image, --model-impl transformers",
        "TransformersMultiModalMoEForCausalLM",
        checkpoint="qwen3_vl_moe_saved",
        engine_args=ONE_IMAGE | {"model_impl": "transformers"},
        asked={"image_token": QWEN_IMAGE},
        needs_torchvision=True,
    ),
    "aria_transformers": _model(
        "Aria, with an image, --model-impl transformers",
        "TransformersMultiModalMoEForCausalLM",
        checkpoint="aria",
        engine_args={
            "max_num_batched_tokens": 512,
            "mm_processor_kwargs": {"max_image_size": 490},
            "model_impl": "transformers",
        },
        asked={"image_token": IMAGE_TOKEN},
    ),
    "mistral_large_3": _model(
        "Mistral-Large-3",
        "MistralLarge3ForCausalLM",
        engine_args={"tokenizer_mode": "hf", "config_format": "mistral", "load_format": "mistral"},
    ),
    "clef_omni": _model(
        "Clef-Omni, asked with text",
        "ClefOmniForJointSchema",
        engine_args=TEXT_ONLY | {"runner": "pooling"},
        asked={"pooling": "token_classify", "pooling_extra": {"joint_schema": TWO_QUESTIONS}},
        needs_torchvision=True,
    ),
    "colqwen3_5": _model(
        "ColQwen-3.5, given experts, text, without linear attention",
        "ColQwen3_5",
        engine_args=TEXT_ONLY | UNCACHED | {"runner": "pooling"},
        asked={"pooling": "token_embed"},
        needs_torchvision=True,
    ),
    "gemma4_unified": _model(
        "Gemma-4 unified, with experts, asked with text",
        "Gemma4UnifiedForConditionalGeneration",
        engine_args=TEXT_ONLY,
        needs_torchvision=True,
    ),
    "qwen3_omni_moe": _model(
        "Qwen3-Omni, asked with text",
        "Qwen3OmniMoeForConditionalGeneration",
        engine_args=TEXT_ONLY,
        needs_torchvision=True,
    ),
    "minicpmv4_6": _model(
        "MiniCPM-V 4.6",
        "MiniCPMV4_6ForConditionalGeneration",
        engine_args=TEXT_ONLY | UNCACHED,
        needs_torchvision=True,
    ),
    "minicpmv4_7": _model(
        "MiniCPM-V 4.7",
        "MiniCPMV4_7ForConditionalGeneration",
        engine_args=TEXT_ONLY | UNCACHED,
        needs_torchvision=True,
    ),
    "qwen3_5_moe_full": _model(
        "Qwen3.5-MoE, text, without linear attention",
        "Qwen3_5MoeForConditionalGeneration",
        engine_args=TEXT_ONLY | UNCACHED,
        needs_torchvision=True,
    ),
    "jamba_classifier": _model(
        "Jamba that classifies, hybrid",
        "JambaForSequenceClassification",
        engine_args={"runner": "pooling"},
        asked={"pooling": "classify"},
        stock_error="Dimension out of range",
    ),
    "privacy_filter": _model(
        "OpenAI Privacy Filter, which labels tokens",
        "OpenAIPrivacyFilterForTokenClassification",
        engine_args={"runner": "pooling", "max_num_batched_tokens": 512} | UNCACHED,
        asked={"pooling": "token_classify"},
    ),
}
"""By name."""

assert {model.checkpoint or name for name, model in MODELS.items()} <= NAMES

UNTRIED: dict[str, str] = {
    "EmbeddingGemma2Model": "vLLM builds no experts for it: its text model is dense, whatever its "
    "config says. It shares code for pictures and sound with Gemma-4, which has experts",
}
"""Architectures without a checkpoint here, and why."""
