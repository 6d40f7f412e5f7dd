"""LoRA adapters of random weights in PEFT's format, and engines that are driven with them.

The driving functions run in an engine process (`engine_process.py`), stock or ours. As a program it
drives an offline `LLM` over two ranks: python -m tests.e2e.adapters CASE
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.e2e.engine_process import PROMPTS

RANK = 8
DENSE = ("q_proj", "k_proj", "v_proj", "o_proj")
ADAPTED_PROMPTS, NUM_TOKENS = PROMPTS[:3], 8
EXPERTS = ("gate_proj", "up_proj", "down_proj")


def make_adapter(folder: Path, model: str, modules: tuple[str, ...], seed: int) -> str:
    """Write an adapter of a Qwen3-MoE whose every matrix changes the output; returns the folder.

    Args:
        folder: is created.
        model: checkpoint that it is for.
        modules: names of the linear layers that it changes.
    """
    folder.mkdir(parents=True)
    config = json.loads(Path(model, "config.json").read_text())
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    shapes = {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }
    dice = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        places = [(f"self_attn.{name}", name) for name in modules if name in DENSE]
        places += [
            (f"mlp.experts.{expert}.{name}", name)
            for expert in range(config["num_local_experts"])
            for name in modules
            if name in EXPERTS
        ]
        for place, name in places:
            fan_in, fan_out = shapes[name]
            path = f"base_model.model.model.layers.{layer}.{place}"
            a = torch.randn(RANK, fan_in, generator=dice) / math.sqrt(fan_in)
            b = torch.randn(fan_out, RANK, generator=dice) * 0.5
            tensors[f"{path}.lora_A.weight"] = a.bfloat16()
            tensors[f"{path}.lora_B.weight"] = b.bfloat16()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": model,
                "r": RANK,
                "lora_alpha": RANK,
                "bias": "none",
                "target_modules": list(modules),
            }
        )
    )
    return str(folder)


def request(case: dict[str, Any], name: str) -> Any:
    """Return the request for an adapter of a case; None for none."""
    from vllm.lora.request import LoRARequest

    if name == "base":
        return None
    number = sorted(case["adapters"]).index(name) + 1
    return LoRARequest(name, number, case["adapters"][name])


def every_way(engine: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Ask with each adapter alone, with both in one batch, and as adapters come and go."""
    first, second = sorted(case["adapters"])
    loaded = [sorted(engine.list_loras())]
    found = {"base": tokens(engine, case, ["base"])}
    assert engine.add_lora(request(case, first))
    loaded.append(sorted(engine.list_loras()))
    found[first] = tokens(engine, case, [first])
    found[second] = tokens(engine, case, [second])  # loaded by its first request
    loaded.append(sorted(engine.list_loras()))
    found["together"] = tokens(engine, case, ["base", first, second])
    assert engine.remove_lora(request(case, first).lora_int_id)
    loaded.append(sorted(engine.list_loras()))
    found["base, later"] = tokens(engine, case, ["base"])
    found[f"{second}, later"] = tokens(engine, case, [second])
    assert engine.add_lora(request(case, first))
    found[f"{first}, later"] = tokens(engine, case, [first])
    return {"tokens": found, "loaded": loaded}


def expert_adapter_bytes(worker: Any) -> dict[str, int]:
    """Bytes that vLLM has allocated for the experts' part of all slots."""
    from vllm.lora.layers.fused_moe import FusedMoEWithLoRA

    return {
        "adapter_bytes": sum(
            tensor.nbytes
            for module in worker.model_runner.get_model().modules()
            if isinstance(module, FusedMoEWithLoRA)
            for stacked in (
                module.w13_lora_a_stacked,
                module.w13_lora_b_stacked,
                module.w2_lora_a_stacked,
                module.w2_lora_b_stacked,
            )
            for tensor in stacked
        )
    }


def adapter_bytes(worker: Any) -> dict[str, dict[str, int]]:
    """Bytes of the slots that vLLM has allocated, by the name of what they are for."""
    from vllm.lora.layers import BaseLayerWithLoRA

    return {
        "slot_bytes": {
            name: sum(
                tensor.nbytes
                for attribute, stacked in vars(module).items()
                if attribute.endswith(("lora_a_stacked", "lora_b_stacked"))
                for tensor in (stacked if isinstance(stacked, tuple) else (stacked,))
                if isinstance(tensor, torch.Tensor)
            )
            for name, module in worker.model_runner.get_model().named_modules()
            if isinstance(module, BaseLayerWithLoRA)
        }
    }


def each_alone(engine: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Ask with each adapter and with none."""
    names = ["base", *sorted(case["adapters"])]
    return {"tokens": {name: tokens(engine, case, [name]) for name in names}}


def tokens(engine: Any, case: dict[str, Any], names: list[str]) -> list[list[int]]:
    """Greedy tokens of every prompt with every adapter; all requests are there from the beginning."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    found: dict[str, list[int]] = {}
    for index, text in enumerate(ADAPTED_PROMPTS):
        for name in names:
            found[f"{index}-{name}"] = []
            lora = request(case, name)
            engine.add_request(f"{index}-{name}", text, params, lora_request=lora)
    while engine.has_unfinished_requests():
        for output in engine.step():
            found[output.request_id] = list(output.outputs[0].token_ids)
    return list(found.values())


def offline(case: dict[str, Any]) -> dict[str, Any]:
    """Ask an offline `LLM` over two ranks: with one adapter for a call, then one for each prompt."""
    from vllm import SamplingParams

    from vllm_dwdp import LLM

    llm = LLM(case["model"], data_parallel_size=2, **case["llm"])
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)

    def tokens(prompts: list[str], adapters: Any) -> list[list[int]]:
        outputs = llm.generate(prompts, params, lora_request=adapters, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    names = ["base", *sorted(case["adapters"])]
    found = {name: tokens(ADAPTED_PROMPTS, request(case, name)) for name in names}
    dealt = [(text, name) for _ in range(4) for text in ADAPTED_PROMPTS for name in names]
    mixed = tokens([text for text, _ in dealt], [request(case, name) for _, name in dealt])
    return {
        "tokens": found,
        "mixed": mixed,
        "dealt": dealt,
        "status": llm.dwdp_status(),
        "loaded": change_adapters(llm, case),
    }


def change_adapters(llm: Any, case: dict[str, Any]) -> list[Any]:
    """Return what all ranks together say as adapters come, are pinned and go, also on one rank only."""
    engine, first, second = llm.llm_engine, *sorted(case["adapters"])
    said: list[Any] = []

    def say(answer: Any) -> None:
        said.append([answer, sorted(engine.list_loras())])

    say([engine.remove_lora(request(case, name).lora_int_id) for name in (first, second)])
    say(engine.add_lora(request(case, first)))
    say(engine.pin_lora(1))
    say(tokens_of_one(llm, request(case, second)))  # one rank has loaded it now
    say(engine.remove_lora(2))
    say(engine.remove_lora(2))
    try:
        engine.pin_lora(2)
    except Exception as error:
        say([str(error), *getattr(error, "__notes__", ())])
    return said


def tokens_of_one(llm: Any, adapter: Any) -> int:
    """Answer one prompt; the number of its tokens."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    (output,) = llm.generate("one", params, lora_request=adapter, use_tqdm=False)
    return len(output.outputs[0].token_ids)


if __name__ == "__main__":
    print("FOUND", json.dumps(offline(json.loads(sys.argv[1]))))
