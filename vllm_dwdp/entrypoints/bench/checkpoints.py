"""Small MoE checkpoints with random weights, real enough for vLLM: config, weights, tokenizer.

They are written by transformers' own `save_pretrained`, so the files have the layout that real
checkpoints have. The texts they produce are nonsense, and the same nonsense everywhere.
"""

import string
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

_CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)

COMMON: dict[str, Any] = {
    "vocab_size": 512,
    # 160 and 96 make experts of 15 and 7.5 pages of 4 KiB: they do not end on page boundaries.
    "hidden_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
"""What every family's config can take."""
DONE = "model.safetensors.done"
"""A file beside the weights of a finished checkpoint."""


def qwen3_moe(num_experts: int) -> transformers.PretrainedConfig:
    """Describe a small Qwen3-MoE."""
    return transformers.Qwen3MoeConfig(
        **COMMON,
        intermediate_size=160,
        moe_intermediate_size=96,
        num_experts=num_experts,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    )


def make_checkpoint(folder: Path, num_experts: int = 8, seed: int = 0, **overrides: Any) -> Path:
    """Write a Qwen3-MoE checkpoint of random bf16 weights and return `folder`.

    Args:
        folder: created if absent; a folder that holds a finished checkpoint is kept as it is.
        num_experts: routed experts per MoE layer.
        seed: of the weights.
        overrides: fields of the Hugging Face config, e.g. `hidden_size=1024`.
    """
    return write_checkpoint(folder, qwen3_moe(num_experts), seed, **overrides)


def write_checkpoint(
    folder: Path, config: transformers.PretrainedConfig, seed: int = 0, **overrides: Any
) -> Path:
    """Write random weights of any architecture, as `make_checkpoint` does."""
    done = folder / DONE
    if done.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for key, value in overrides.items():
        setattr(config, key, value)
    _save_model(folder, config, seed)
    save_tokenizer(folder)
    done.touch()
    return folder


def _save_model(folder: Path, config: transformers.PretrainedConfig, seed: int) -> None:
    torch.manual_seed(seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = _empty_model(config)
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith("bias"):
                # Large enough that every expert and every token visibly changes the output.
                parameter.normal_(0.0, 0.15 if "expert" in name or "mlp" in name else 0.08)
    model.save_pretrained(folder)


def _empty_model(config: transformers.PretrainedConfig) -> Any:
    """Return a model of the class that the config names, or of the one for its type."""
    if config.architectures:
        return getattr(transformers, config.architectures[0])(config)
    if hasattr(config, "vision_config"):
        return transformers.AutoModelForImageTextToText.from_config(config)
    return transformers.AutoModelForCausalLM.from_config(config)


def save_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer: every text round-trips, no file is downloaded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate(specials + alphabet)}
    words = [a + b for a in string.ascii_lowercase[:9] for b in string.ascii_lowercase]
    for word in words:
        vocabulary.setdefault(word, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(w[0], w[1]) for w in words]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=_CHAT_TEMPLATE,
    )
    fast.save_pretrained(folder)
