"""One rank, or one stock engine, that runs a list of cases in one process and writes its tokens.

The real engine core and the real worker run in this process, so that a case costs a second and every
architecture can be compared. Forked by `matrix.py`, one process per rank, in vLLM's SPMD offline
style.
"""

import contextlib
import dataclasses
import functools
import gc
import importlib
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LISTENING = " 00010000 "
"""The flags of a listening socket in /proc/net/unix."""
PROMPTS = [
    "The capital of France is",
    "a",
    "Independent ranks read each other's experts " * 6,
    "".join(chr(33 + 7 * i % 90) for i in range(150)),
]


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    rank = int(sys.argv[2])
    output = Path(sys.argv[3])
    with output.open("w") as file:
        for number, case in enumerate(cases):
            if rank < case.get("num_ranks", 1):
                if "alone" not in sys.argv:
                    begin_together(output.parent / f"{Path(sys.argv[1]).stem}-{number}", case, rank)
                file.write(json.dumps(run(case, rank)) + "\n")
                file.flush()


def run(case: dict[str, Any], rank: int) -> dict[str, Any]:
    """Return a case, which may put something else in the place of an object.

    `prepare` names a function that is called first.
    """
    if "prepare" in case:
        owner, name = find(case["prepare"])
        getattr(owner, name)()
    if case.get("fails"):
        return run_failing_case(case, rank)
    with replaced(case["replace"]) if "replace" in case else contextlib.nullcontext():
        result = run_case(case, rank)
    if "simulated" in json.dumps(case):
        from gpu_checks.fake import live_objects

        gc.collect()
        result["cuda_left"] = dataclasses.asdict(live_objects())
    return result


def make_simulated_device(worker: Any) -> Any:
    """In the place of `DwdpCPUWorker.make_device`."""
    from gpu_checks.simulated_cuda import SimulatedCudaMemory

    return SimulatedCudaMemory()


def begin_together(place: Path, case: dict[str, Any], rank: int) -> None:
    """Return when every rank of the case is here: a failed one must not shift the others."""
    ranks = range(case.get("num_ranks", 1))
    place.with_suffix(f".begun{rank}").touch()
    deadline = time.monotonic() + case.get("begin_s", 120)
    while not all(place.with_suffix(f".begun{other}").exists() for other in ranks):
        assert time.monotonic() < deadline, f"the other ranks do not begin {case['name']}"
        time.sleep(0.02)


def run_case(case: dict[str, Any], rank: int) -> dict[str, Any]:
    """Build the engine, generate greedily one request at a time, and tear everything down.

    `drive` names a function that does the work with the engine instead; `report` one whose findings
    about the worker join the result; `run` one that does all of this in its own way.
    """
    take_place(case, rank)
    if "run" in case:
        owner, name = find(case["run"])
        return {"name": case["name"], "rank": rank} | getattr(owner, name)(case)
    started = time.monotonic()
    engine = make_engine(case)
    try:
        result: dict[str, Any] = {"name": case["name"], "rank": rank}
        if "soak" in case:
            result |= soak(engine, **case["soak"])
        elif "drive" in case:
            owner, name = find(case["drive"])
            result |= getattr(owner, name)(engine, case)
        elif "text" in case:
            result["logprobs"] = prompt_logprobs(engine, case["text"])
        else:
            result["tokens"] = [ask(engine, case, n, text) for n, text in enumerate(PROMPTS)]
        if "updates" in case:
            result["updates"] = [update(engine, each, rank) for each in case["updates"]]
        result |= findings_of_workers(engine, case)
        result["seconds"] = time.monotonic() - started
        return result
    finally:
        close_engine(engine)


def update(engine: Any, steps: dict[str, Any], rank: int) -> dict[str, Any]:
    """Renew the weights by calls of a worker, and generate with them; or say why not.

    Args:
        steps: `calls` of a worker's methods, `[name, keywords]` each, on some of the `ranks` only if
            given; `kill` names a function that fails on rank `on`, with SIGKILL or as `with` says.
    """
    killing = contextlib.nullcontext()
    if steps.get("on") == rank:
        fails = {"fail_at": steps["kill"], "fail_with": steps.get("with", "SIGKILL")}
        killing = failing(fails, 0)
    said: dict[str, Any] = {"error": "", "refused": "", "resume": "", "tokens": []}
    try:
        with killing:
            calls = steps["calls"] if rank in steps.get("ranks", [rank]) else []
            for name, keywords in calls:
                engine.collective_rpc(name, kwargs=keywords)
        engine.reset_prefix_cache()
    except Exception as error:
        said["error"] = f"{type(error).__name__}: {error}"
    try:
        said["tokens"] = [generate(engine, n, text) for n, text in enumerate(PROMPTS)]
    except Exception as error:
        said["refused"] = f"{type(error).__name__}: {error}"
        for scheduled in list(engine.engine_core.engine_core.scheduler.requests):
            engine.abort_request([scheduled], internal=True)
    try:
        engine.engine_core.engine_core.resume_scheduler()
    except Exception as error:
        said["resume"] = f"{type(error).__name__}: {error}"
    said["status"] = engine.collective_rpc("dwdp_status")[0] if rank >= 0 else {}
    return said


def findings_of_workers(engine: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Status, digests and report of the engine's worker; of several a list of all, as `workers`."""
    report = functools.partial(findings_of_worker, case)
    executor = engine.model_executor
    if hasattr(executor, "driver_worker"):
        return report(executor.driver_worker)
    return {"workers": executor.collective_rpc(report)}


def findings_of_worker(case: dict[str, Any], wrapper: Any) -> dict[str, Any]:
    worker = wrapper.worker
    found: dict[str, Any] = {"weights": digest_of_weights(worker)}
    if case.get("num_ranks", 1) > 1:
        found["status"] = worker.dwdp_status()
    if "report" in case:
        owner, name = find(case["report"])
        found |= getattr(owner, name)(worker)
    return found


def mapped_segments(worker: Any) -> dict[str, list[str]]:
    """Return what a worker maps of vLLM's segments for tensors of all workers: each with its fate."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {"segments": sorted({line.split(maxsplit=5)[5] for line in lines if "cpushm" in line})}


def take_place(case: dict[str, Any], rank: int) -> None:
    """Make this process `rank` of the case, in vLLM's SPMD offline style; all share GPU 0."""
    os.environ["VLLM_DP_SIZE"] = str(case.get("num_ranks", 1))
    os.environ["VLLM_DP_RANK"], os.environ["VLLM_DP_RANK_LOCAL"] = str(rank), "0"
    os.environ["VLLM_DP_MASTER_PORT"] = str(case["port"])


def run_failing_case(case: dict[str, Any], rank: int) -> dict[str, Any]:
    """Return a start that may not succeed; report the error, if there is one, and what is left.

    `fail_at` names a function that fails on rank 0, by `fail_with` or else an exception; `replace`
    a name and its value.
    """
    gc.collect()
    before = footprint()
    error = ""
    result: dict[str, Any] = {}
    peak = PeakMemory()
    with replaced(case["replace"]) if "replace" in case else failing(case, rank):
        try:
            result = run_case(case, rank)
        except BaseException as caught:
            line = traceback.extract_tb(caught.__traceback__)[-1].line
            error = f"{type(caught).__name__}: {caught} ({line})"
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()
    return result | {
        "name": case["name"],
        "rank": rank,
        "error": error,
        "peak_bytes": peak.stop(),
        "left": {key: value - before[key] for key, value in footprint().items()},
    }


class PeakMemory:
    """The most memory that this process took since it was made, of each kind."""

    KINDS = ("RssAnon", "RssShmem", "RssFile")

    def __init__(self) -> None:
        self._before = self._sample()
        self._peak = {"own": 0, "file": 0}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _sample(self) -> dict[str, int]:
        text = Path("/proc/self/status").read_text()
        return {kind: int(text.split(f"{kind}:")[1].split()[0]) * 1024 for kind in self.KINDS}

    def _run(self) -> None:
        while not self._stop.wait(0.003):
            now = self._sample()
            anonymous, shared, file = (now[kind] - self._before[kind] for kind in self.KINDS)
            self._peak["own"] = max(self._peak["own"], anonymous + shared)
            self._peak["file"] = max(self._peak["file"], file)

    def stop(self) -> dict[str, int]:
        """Bytes of anonymous and shared memory, and of pages of mapped files (the checkpoint)."""
        self._stop.set()
        self._thread.join()
        return self._peak


@contextlib.contextmanager
def failing(case: dict[str, Any], rank: int) -> Iterator[None]:
    """While active, the function `fail_at` ("module:path") fails on rank 0."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        if case.get("fail_with") == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        if case.get("fail_with") == "KeyboardInterrupt":
            raise KeyboardInterrupt
        raise RuntimeError(f"injected at {case['fail_at']}")

    inject = "fail_at" in case and rank == 0
    with replaced([case["fail_at"], fail]) if inject else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def replaced(replacement: list[Any]) -> Iterator[None]:
    """While active, the object named "module:path" is another, given as a value or by name."""
    place, value = replacement
    owner, name = find(place)
    stock = getattr(owner, name)
    setattr(owner, name, getattr(*find(value)) if isinstance(value, str) else value)
    try:
        yield
    finally:
        setattr(owner, name, stock)


def find(place: str) -> tuple[Any, str]:
    """Return the owner and the attribute that "module:path" names."""
    module_name, _, path = place.partition(":")
    owner: Any = importlib.import_module(module_name)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    return owner, name


def footprint() -> dict[str, int]:
    """List what a start could leave in this process: shared memory, its mappings, sockets, threads."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
    sockets = Path("/proc/net/unix").read_text().splitlines()
    # Where this rank listens; its peers, and other tests, listen elsewhere.
    place = f"-{os.environ.get('VLLM_DP_MASTER_PORT')}/g0-r{os.environ.get('VLLM_DP_RANK')}"
    names = [thread.name for thread in threading.enumerate()]
    native = []
    for comm in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # the thread has ended
            native.append(comm.read_text())
    return {
        "memfds": sum("memfd:dwdp" in link for link in links),
        "mappings": Path("/proc/self/maps").read_text().count("memfd:dwdp"),
        "sockets": sum(LISTENING in line and line.endswith(place) for line in sockets),
        "threads": sum(name.startswith("dwdp") for name in names),
        "native_threads": sum(name.startswith("dwdp") for name in native),
    }


def make_engine(case: dict[str, Any]) -> Any:
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor import Executor

    dwdp = case.get("num_ranks", 1) > 1
    settings: dict[str, Any] = {
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 1,
        "max_num_batched_tokens": 64,
        "enable_chunked_prefill": True,
        "enable_prefix_caching": True,
        "kv_cache_memory_bytes": 64 * 2**20,
        "distributed_executor_backend": "dwdp" if dwdp else stock_backend(case),
        "additional_config": {"dwdp": case["dwdp"]} if dwdp else {},
    }
    args = EngineArgs(model=case["model"], **(settings | case.get("engine_args", {})))
    vllm_config = args.create_engine_config()
    if args.tensor_parallel_size > 1 or case.get("dwdp", {}).get("executor") == "mp":
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"  # this process has imported vLLM
    return LLMEngine(
        vllm_config,
        executor_class=Executor.get_class(vllm_config),
        log_stats=case.get("log_stats", False),
        multiprocess_mode=False,
    )


def stock_backend(case: dict[str, Any]) -> str:
    return "mp" if case.get("engine_args", {}).get("tensor_parallel_size", 1) > 1 else "uni"


def ask(engine: Any, case: dict[str, Any], index: int, text: str) -> list[Any]:
    """Return a case's answer to one prompt: tokens, or a vector of a model that pools (`pooling`).

    `image_token` stands for a picture, which then comes before the prompt.
    """
    if "pooling" in case:
        return pool(engine, index, text, case["pooling"], case.get("pooling_extra"))
    if "image_token" not in case:
        return generate(engine, index, text)
    import numpy
    from PIL import Image

    pixels = numpy.random.default_rng(index).integers(0, 256, (64, 48, 3), dtype=numpy.uint8)
    given = {"image": Image.fromarray(pixels)}
    return generate(
        engine, index, {"prompt": case["image_token"] + text, "multi_modal_data": given}
    )


def pool(
    engine: Any, index: int, text: str, task: str, extra: dict[str, Any] | None = None
) -> list[float]:
    from vllm import PoolingParams

    params = PoolingParams(task=task, extra_kwargs=extra)
    engine.add_request(f"request-{index}", text, params)
    vector: list[float] = []
    while engine.has_unfinished_requests():
        for output in engine.step():
            vector = output.outputs.data.float().flatten().tolist()
    return vector


def generate(engine: Any, index: int, text: Any, **options: Any) -> list[int]:
    from vllm import SamplingParams

    greedy = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
    engine.add_request(f"request-{index}", text, SamplingParams(**greedy | options))
    tokens: list[int] = []
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens = list(output.outputs[0].token_ids)
    return tokens


def prompt_logprobs(engine: Any, text: str) -> list[float]:
    """Return the log-probability of each token of `text` but the first, given those before it."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    engine.add_request("text", text, params)
    while engine.has_unfinished_requests():
        outputs = engine.step()
    ids, listed = outputs[0].prompt_token_ids, outputs[0].prompt_logprobs
    return [each[token].logprob for token, each in zip(ids[1:], listed[1:], strict=True)]


def soak(engine: Any, num_steps: int, seed: int) -> dict[str, Any]:
    """Run random traffic that depends on nothing but `seed`: the batches are the same anywhere.

    Requests of mixed lengths come and go, some are aborted, and a small KV cache preempts others.
    """
    from vllm import SamplingParams
    from vllm.v1.request import RequestStatus

    dice = random.Random(seed)
    scheduler = engine.engine_core.engine_core.scheduler
    tokens: dict[str, list[int]] = {}
    alive: list[str] = []
    num_preempted = num_aborted = num_batches = 0
    for step in range(num_steps):
        if len(alive) < 10 and dice.random() < 0.3:
            name = f"request-{step}"
            prompt = [dice.randrange(4, 500) for _ in range(dice.choice((1, 5, 40, 150)))]
            params = SamplingParams(
                temperature=0, max_tokens=dice.choice((1, 20, 120)), ignore_eos=True
            )
            engine.add_request(name, {"prompt_token_ids": prompt}, params)
            alive.append(name)
        if alive and dice.random() < 0.03:
            num_aborted += 1
            victim = alive.pop(dice.randrange(len(alive)))
            engine.abort_request([victim])
            tokens.pop(victim, None)
        if not engine.has_unfinished_requests():
            continue
        for output in engine.step():
            if output.request_id in alive:
                tokens[output.request_id] = list(output.outputs[0].token_ids)
                if output.finished:
                    alive.remove(output.request_id)
        num_batches += 1
        num_preempted += sum(
            request.status == RequestStatus.PREEMPTED for request in scheduler.waiting
        )
    return {
        "tokens": sorted(tokens.items()),
        "preempted": num_preempted,
        "aborted": num_aborted,
        "batches": num_batches,
    }


def digest_of_weights(worker: Any) -> dict[str, str]:
    """SHA-256 of every expert parameter as the kernels see it; remote bytes are really read.

    In prefetch mode each layer is brought into its slot first, as its forward would.
    """
    import hashlib

    import torch
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from vllm_dwdp.model_executor import ops

    digests = {}
    for module in worker.model_runner.get_model().modules():
        if not isinstance(module, RoutedExperts):
            continue
        position = getattr(module, "ring_position", None)
        parameters = dict(module.named_parameters(recurse=False))
        dummy = torch.zeros(1, device=next(iter(parameters.values())).device)
        if position is not None:
            ops.wait_layer(dummy, position.ring, position.index)
        for name, parameter in parameters.items():
            content = parameter.data.contiguous().view(torch.uint8).cpu().numpy().tobytes()
            digests[f"{module.layer_name}.{name}"] = hashlib.sha256(content).hexdigest()
        if position is not None:
            ops.record_layer(dummy, position.ring, position.index)
    return digests


def close_engine(engine: Any) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    engine.engine_core.shutdown()
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()
