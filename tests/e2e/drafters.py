"""Targets whose next token depends on the last one only, and drafters that know it as they do.

Attention adds nothing to the residual stream, and rows of the embedding have one length, so that a norm
changes nothing. A drafter with a copy of the target's first layer then computes what that layer
computes, experts included; what the target's other layers add is small, so that most of its drafts are
accepted, and some are not.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.e2e.engine_process import PROMPTS

Tensors = dict[str, torch.Tensor]

OTHER_LAYERS = 0.1
"""Factor of what layers other than the first one add."""


def make_target(folder: Path, source: str, first_layer: float = 1.0, **config: Any) -> str:
    """Write such a target, which has an MTP layer behind its last one; returns the folder.

    Args:
        folder: is created.
        source: a checkpoint with experts in every layer.
        first_layer: factor of what its first layer adds.
        config: overrides.
    """
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text()) | config
    tensors = load_file(folder / "model.safetensors")
    rows = tensors["model.embed_tokens.weight"].float()
    rows /= rows.square().mean(1, keepdim=True).sqrt()
    tensors["model.embed_tokens.weight"] = rows.bfloat16()
    for name, tensor in tensors.items():
        if name.endswith("o_proj.weight"):
            tensor.zero_()
        if name.endswith("down_proj.weight"):
            tensor.mul_(first_layer if ".layers.0." in name else OTHER_LAYERS)
    last = f"model.layers.{config['num_hidden_layers']}"
    hidden = config["hidden_size"]
    tensors |= layer_of(tensors, 0, f"{last}.") | {
        f"{last}.enorm.weight": torch.ones(hidden).bfloat16(),
        f"{last}.hnorm.weight": torch.ones(hidden).bfloat16(),
        f"{last}.eh_proj.weight": embedding_only(hidden),
        f"{last}.embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
        f"{last}.shared_head.norm.weight": tensors["model.norm.weight"].clone(),
        f"{last}.shared_head.head.weight": tensors["lm_head.weight"].clone(),
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    return str(folder)


def make_dense_eagle(folder: Path, target: str) -> str:
    """Write an Eagle head of a dense layer that adds nothing, for a target whose layers add little."""
    of_target = json.loads(Path(target, "config.json").read_text())
    tensors = load_file(Path(target, "model.safetensors"))
    hidden = of_target["hidden_size"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "intermediate_size": 64,
        "torch_dtype": "bfloat16",
    } | {
        name: of_target[name]
        for name in ("hidden_size", "vocab_size", "max_position_embeddings", "rms_norm_eps")
    }
    shapes = {
        "self_attn.q_proj": (160, hidden),
        "self_attn.k_proj": (32, hidden),
        "self_attn.v_proj": (32, hidden),
        "self_attn.o_proj": (hidden, 160),
        "mlp.gate_proj": (64, hidden),
        "mlp.up_proj": (64, hidden),
        "mlp.down_proj": (hidden, 64),
    }
    head = {f"layers.0.{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}
    head |= {"layers.0.post_attention_layernorm.weight": torch.ones(hidden)}
    head = {name: tensor.bfloat16() for name, tensor in head.items()}
    head |= {
        "embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
        "fc.weight": embedding_only(hidden),
    }
    return write_head(folder, target, config, head)


def make_expert_eagle(folder: Path, target: str) -> str:
    """Write an Eagle head that is the first layer of a DeepSeek target, experts included."""
    of_target = json.loads(Path(target, "config.json").read_text())
    tensors = load_file(Path(target, "model.safetensors"))
    hidden = of_target["hidden_size"]
    layer = of_target | {"architectures": ["DeepSeekMTPModel"], "num_hidden_layers": 1}
    del layer["num_nextn_predict_layers"]
    config = {"model_type": "eagle", "architectures": ["EagleDeepSeekMTPModel"], "model": layer}
    head = layer_of(tensors, 0, "layers.0.") | {
        "embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
        "norm.weight": tensors["model.norm.weight"].clone(),
        "enorm.weight": torch.ones(hidden).bfloat16(),
        "hnorm.weight": torch.ones(hidden).bfloat16(),
        "fc.weight": embedding_only(hidden),
    }
    return write_head(folder, target, config, head)


def write_head(folder: Path, target: str, config: dict[str, Any], tensors: Tensors) -> str:
    """Write a drafter of its own beside the target's tokenizer."""
    shutil.copytree(target, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def layer_of(tensors: Tensors, index: int, place: str) -> Tensors:
    """Return a copy of a layer's tensors, named for another place."""
    prefix = f"model.layers.{index}."
    return {
        place + name.removeprefix(prefix): tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def embedding_only(hidden: int) -> torch.Tensor:
    """Return a projection that takes the embedding and leaves the target's hidden state out."""
    return torch.cat([torch.eye(hidden), torch.zeros(hidden, hidden)], 1).bfloat16()


def speculate(engine: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Tokens of every prompt, one request at a time, and what vLLM counted meanwhile."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=case["max_tokens"], ignore_eos=True)
    tokens: list[list[int]] = []
    for index, text in enumerate(PROMPTS):
        engine.add_request(f"request-{index}", text, params)
        tokens.append([])
        while engine.has_unfinished_requests():
            for output in engine.step():
                tokens[-1] = list(output.outputs[0].token_ids)
    prefix = "vllm:spec_decode_num_"
    counted = {
        metric.name.removeprefix(prefix): metric.value
        for metric in engine.get_metrics()
        if metric.name.startswith(prefix) and hasattr(metric, "value")
    }
    return {"tokens": tokens, "counted": counted}


def renew_and_speculate(engine: Any, case: dict[str, Any]) -> dict[str, Any]:
    """As `speculate`, also after the drafter alone has got the weights of the case's `drafter`."""
    before = speculate(engine, case)
    sent = {"folder": case["drafter"], "parts": [f"layers.{case['drafter_layer']}."]}
    engine.collective_rpc("start_draft_weight_update")
    engine.collective_rpc("update_weights", kwargs={"update_info": sent})
    engine.collective_rpc("finish_weight_update")
    engine.reset_prefix_cache()
    after = speculate(engine, case)
    since = {name: value - before["counted"][name] for name, value in after["counted"].items()}
    return before | {"tokens_after": after["tokens"], "counted_after": since}


def lose_experts(folder: Path, target: str, layer: int) -> str:
    """Write a target whose drafter, its layer behind the others, has experts that add nothing."""
    shutil.copytree(target, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if f".layers.{layer}.mlp.experts." in name and "down_proj" in name:
            tensor.zero_()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def ring_traffic(worker: Any) -> dict[str, Any]:
    """Bytes that each model's ring has fetched, and those of its layers that are elsewhere."""
    group = getattr(worker, "expert_group", None)
    rings = None if group is None else group.views.rings
    if rings is None:
        return {"fetched": [], "remote_bytes": []}
    return {
        "fetched": [sum(counter.fetched_bytes.values()) for counter in rings.counters()],
        "remote_bytes": [
            sum(sum(ring.layer_bytes(layer).values()) for layer in range(len(ring.batches)))
            for ring in rings.rings
        ],
    }
