"""What `test_features.py` asks of one engine, stock or a rank: every request in one process, in order.

vLLM's own `LLM` runs in the process, so that the same calls make the same batches in every engine.
"""

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open

from gpu_checks.multimodal import IMAGE_TOKEN

LONG = "Independent ranks read each other's experts " * 6
SHORT = "The capital of France is"
PROMPTS = [SHORT, "a", LONG[:40], LONG[7:], "x y z"]
CITIES = ["Paris", "Rome", "Oslo", "Cairo", "Lima", "Quito", "Hanoi", "Baku"]
KV_PROMPTS = [f"{number} {LONG}" for number in range(4)]
KV_EVENTS_MS = 2000
NUM_RANKS = 2
LETTERS = "abcdefgh"
NUM_LETTERS = 8
SETTINGS: dict[str, Any] = {
    "enforce_eager": True,
    "max_model_len": 512,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "kv_cache_memory_bytes": 64 * 2**20,
    "seed": 0,
}


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Return the answers to a case's requests by name, or the error that ended the engine.

    Args:
        case: `llm` are arguments of `vllm.LLM`, `requests` names of `REQUESTS`.
    """
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    is_rank = case.get("num_ranks", 1) > 1
    settings = SETTINGS | {"distributed_executor_backend": "dwdp" if is_rank else "uni"}
    if is_rank:
        settings["additional_config"] = {"dwdp": case["dwdp"]}
    try:
        llm = LLM(case["model"], **(settings | case.get("llm", {})))
        result: dict[str, Any] = {
            "answers": {name: REQUESTS[name](llm) for name in case["requests"]}
        }
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    if is_rank:
        (result["status"],) = llm.collective_rpc("dwdp_status")
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return result


def generate(llm: Any, prompts: list[str], **params: Any) -> list[Any]:
    from vllm import SamplingParams

    greedy = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
    outputs: list[Any] = llm.generate(prompts, SamplingParams(**(greedy | params)), use_tqdm=False)
    return outputs


def tokens(llm: Any, prompts: list[str], **params: Any) -> list[list[int]]:
    outputs = generate(llm, prompts, **params)
    return [list(one.token_ids) for output in outputs for one in output.outputs]


def choice(llm: Any) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    asked = StructuredOutputsParams(choice=CITIES)
    outputs = generate(llm, PROMPTS, structured_outputs=asked, ignore_eos=False, max_tokens=20)
    return [output.outputs[0].text for output in outputs]


def schema(llm: Any) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    count = {"minItems": NUM_LETTERS, "maxItems": NUM_LETTERS}
    asked = StructuredOutputsParams(json={"type": "array", "items": {"enum": [*LETTERS]}} | count)
    outputs = generate(llm, [SHORT], structured_outputs=asked, ignore_eos=False, max_tokens=120)
    return outputs[0].outputs[0].text


def logprobs(llm: Any) -> Any:
    (output,) = generate(llm, [SHORT], logprobs=3)
    return [numbers(place) for place in output.outputs[0].logprobs]


def prompt_logprobs(llm: Any) -> Any:
    (output,) = generate(llm, [SHORT], prompt_logprobs=2, max_tokens=1)
    return [numbers(place) if place else None for place in output.prompt_logprobs]


def numbers(place: dict[int, Any]) -> list[list[float]]:
    """Tokens of one place with their log-probabilities and ranks, exactly."""
    return [[token, float(found.logprob), found.rank] for token, found in place.items()]


def several(llm: Any) -> Any:
    return tokens(llm, [SHORT], n=3, temperature=1.0, seed=7)


def beams(llm: Any) -> Any:
    from vllm.sampling_params import BeamSearchParams

    params = BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True)
    (output,) = llm.beam_search([{"prompt": SHORT}], params)
    return [[each.tokens, each.cum_logprob] for each in output.sequences]


def prefix(llm: Any) -> Any:
    """Return the same prompt twice: the second time it is in the cache."""
    llm.reset_prefix_cache()
    outputs = [generate(llm, [LONG])[0] for _ in range(2)]
    return [[output.num_cached_tokens, list(output.outputs[0].token_ids)] for output in outputs]


def chunks(llm: Any) -> Any:
    """Return a prompt that takes several steps, beside one that decodes meanwhile."""
    llm.reset_prefix_cache()
    outputs = generate(llm, [SHORT, LONG])
    return [[len(output.prompt_token_ids), list(output.outputs[0].token_ids)] for output in outputs]


def batch(llm: Any) -> Any:
    return tokens(llm, [SHORT, "a", LONG[:40]], max_tokens=12)


def constraints(llm: Any) -> Any:
    """Return tokens under each way to forbid or to prefer some."""
    (plain,) = tokens(llm, [SHORT])
    asked: dict[str, dict[str, Any]] = {
        "allowed": {"allowed_token_ids": [7, 11, 13]},
        "biased": {"logit_bias": {plain[0]: -100, 17: 100}},
        "stopped": {"stop_token_ids": [plain[2]]},
        "later": {"stop_token_ids": [plain[2]], "min_tokens": 5},
        "penalised": {"repetition_penalty": 0.1},
        "processed": {"extra_args": {"only_even": True}},
    }
    return {"plain": plain} | {
        name: tokens(llm, [SHORT], **each)[0] for name, each in asked.items()
    }


def chat(llm: Any) -> Any:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    (output,) = llm.chat([{"role": "user", "content": "hello"}], params, use_tqdm=False)
    return list(output.outputs[0].token_ids)


def extension(llm: Any) -> Any:
    """Return what a method of `plugged_in.ExpertRows` finds, which joined the worker's class."""
    (found,) = llm.collective_rpc("count_expert_rows")
    return found


def priorities(llm: Any) -> Any:
    """Return the order in which requests end that came in another one, and their tokens."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    for name, priority in (("a", 5), ("b", 3), ("c", 4), ("d", 0)):
        engine.add_request(name, f"{name} {SHORT}", params, priority=priority)
    ended = []
    while engine.has_unfinished_requests():
        ended += [
            [output.request_id, list(output.outputs[0].token_ids)]
            for output in engine.step()
            if output.finished
        ]
    return ended


def embeds(llm: Any) -> Any:
    """Return tokens of a prompt, and those of the rows of the embedding that its tokens name."""
    (output,) = generate(llm, [SHORT])
    with safe_open(Path(llm.model_config.model, "model.safetensors"), "pt") as file:
        rows = file.get_tensor("model.embed_tokens.weight")[output.prompt_token_ids]
    (embedded,) = generate(llm, [{"prompt_embeds": rows}])
    return [list(each.outputs[0].token_ids) for each in (output, embedded)]


def embed(llm: Any) -> Any:
    outputs = llm.embed(PROMPTS, use_tqdm=False)
    return [output.outputs.embedding for output in outputs]


def score(llm: Any) -> Any:
    """Return how near each of several texts is to one, and one to one."""
    many = llm.score(SHORT, PROMPTS[1:], use_tqdm=False)
    pairs = llm.score(PROMPTS[:3], PROMPTS[2:5], use_tqdm=False)
    return [output.outputs.score for output in (*many, *pairs)]


def classify(llm: Any) -> Any:
    return [output.outputs.probs for output in llm.classify(PROMPTS, use_tqdm=False)]


def encode(llm: Any) -> Any:
    outputs = llm.encode(PROMPTS, pooling_task="embed", use_tqdm=False)
    return [output.outputs.data.tolist() for output in outputs]


def images(llm: Any) -> Any:
    """Return tokens of prompts with a picture each, some of which come twice."""
    asked = [pictured(IMAGE_TOKEN + text, number % 3) for number, text in enumerate(PROMPTS * 2)]
    return tokens(llm, asked)


def pictured(text: str, seed: int) -> dict[str, Any]:
    import numpy
    from PIL import Image

    pixels = numpy.random.default_rng(seed).integers(0, 256, (64, 48, 3), dtype=numpy.uint8)
    return {"prompt": text, "multi_modal_data": {"image": Image.fromarray(pixels)}}


def kv_events(llm: Any) -> Any:
    """Return the tokens of each block that prompts have stored, by the rank that tells it over ZMQ."""
    import msgspec
    import zmq
    from vllm.distributed.kv_events import BlockStored, KVEventBatch

    place, _, port = llm.llm_engine.vllm_config.kv_events_config.endpoint.rpartition(":")
    decoder = msgspec.msgpack.Decoder(KVEventBatch)
    found: dict[int, list[list[int]]] = {}
    with zmq.Context() as context, context.socket(zmq.SUB) as heard:
        heard.setsockopt(zmq.SUBSCRIBE, b"")
        for rank in range(NUM_RANKS):
            heard.connect(f"{place.replace('*', '127.0.0.1')}:{int(port) + rank}")
        time.sleep(1)  # until both publishers know of the subscription
        llm.reset_prefix_cache()
        tokens(llm, KV_PROMPTS, max_tokens=1)
        while heard.poll(KV_EVENTS_MS):
            batch = decoder.decode(heard.recv_multipart()[-1])
            for event in batch.events:
                if isinstance(event, BlockStored):
                    size = event.block_size
                    ids = event.token_ids
                    blocks = [ids[start : start + size] for start in range(0, len(ids), size)]
                    found.setdefault(batch.data_parallel_rank, []).extend(blocks)
    return found


def routed_experts(llm: Any) -> Any:
    (output,) = generate(llm, [SHORT])
    found = output.outputs[0].routed_experts
    return None if found is None else found.tolist()


def profile(llm: Any) -> Any:
    """Tokens of a step that is profiled; the folder tells whether something was written."""
    llm.start_profile()
    answered = tokens(llm, [SHORT])
    llm.stop_profile()
    return answered


REQUESTS: dict[str, Callable[[Any], Any]] = {
    each.__name__: each
    for each in (
        *(choice, schema, logprobs, prompt_logprobs, several, beams, prefix, chunks, batch),
        *(routed_experts, profile, constraints, chat, extension, priorities, embeds),
        *(embed, score, classify, encode, images, kv_events),
    )
}


def traces(folder: Path) -> list[str]:
    """Names of what a profiler left in a folder."""
    return [path.name for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
