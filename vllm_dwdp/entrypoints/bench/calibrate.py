"""`vllm-dwdp calibrate FILE`: what this machine reaches, as an entry that `plan` reads.

One core stands for one rank, as the CPU device binds them. Peaks and memory speeds come from small
loops; how much of the peak the matrix products of a model reach comes from whole prefill steps of a
real server, by the difference between long and short prompts, so that what a step costs whatever its
size drops out. Every figure is the best of several repeats: noise only ever slows a machine down.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

from vllm_dwdp.entrypoints.bench.client import BenchClient
from vllm_dwdp.entrypoints.bench.machine import describe_machine
from vllm_dwdp.entrypoints.bench.run import SERVE_ARGUMENTS, SERVE_ARGUMENTS_CPU, default_model
from vllm_dwdp.entrypoints.bench.traffic import Stream, read_stream
from vllm_dwdp.entrypoints.files import check_writable, refusing
from vllm_dwdp.entrypoints.launch.server import Server
from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.planner.checkpoint import read_config
from vllm_dwdp.planner.model_shape import ModelShape, shape_of

REPEATS = 5
GEMM_SIZES = (512, 1024, 2048)
HEADS, HEAD_SIZE, NUM_KEYS = 16, 64, 1024
COPY_BYTES = 256 * 2**20
SHORT_PROMPT, LONG_PROMPT = 256, 1024
ENTRY = "this-machine"

_TEMPLATE = """# Measured on {machine}
# by: {command}
# One core, as one rank. plan and simulate read it: --hardware {path} --gpu {entry}

[{entry}]
bf16_tflops = {gemm:.4g}  # the fastest seen: fp32 products, or what a model reaches in 16 bits
fp8_tflops = {gemm:.4g}  # no faster unit for 8
fp4_tflops = 0
memory_gb = {memory_gb:.4g}
memory_gbps = {read:.4g}
link_gbps = {copy:.4g}  # ranks of one host copy with a core
source = {source}

[{entry}.efficiency]
attention = {attention:.3g}
grouped_gemm = {products:.3g}  # whole prefill steps: {short:.0f} ms for {num_short} tokens,
dense_gemm = {products:.3g}  # {long:.0f} ms for {num_long}; any step also costs {fixed:.0f} ms
memory = 1.0
other_passes = 0  # contained in the products
link = 1.0
direct = {direct:.3g}  # in-place reads are ordinary reads
beside_copies = 0  # the copying thread takes the computing core
"""


def calibrate_machine(path: Path, command: str, say: Callable[[str], None]) -> None:
    """Measure one core and write the entry.

    Raises:
        DwdpConfigError: the file cannot be written, there is a GPU, which this does not measure, or
            other work disturbed the measurement.
    """
    check_writable("calibrate", path)
    import torch

    if torch.cuda.is_available():
        raise DwdpConfigError("calibrate measures CPUs only: no GPU has run this plugin yet.")
    cores = sorted(os.sched_getaffinity(0))
    model = default_model()
    short, long = _step_seconds(model, cores[-1], say)
    measured = _micro(cores[-1], say)
    shape = shape_of(read_config(Path(model)))
    attention = measured["attention"] * measured["gemm"]
    products = products_per_s(shape, long - short, attention)
    # Where 16 bits have a faster unit than fp32, the loop in fp32 is no peak.
    peak = max(measured["gemm"], attention, products / 1e12)
    more = (LONG_PROMPT - SHORT_PROMPT) / (long - short)
    text = entry(
        command,
        path,
        **measured | {"gemm": peak, "attention": attention / peak},
        machine=describe_machine(),
        memory_gb=psutil.virtual_memory().total / 1e9 / len(cores),
        products=products / (peak * 1e12),
        short=1e3 * short,
        long=1e3 * long,
        fixed=1e3 * max(0.0, short - SHORT_PROMPT / more),
    )
    with refusing("calibrate", path):
        path.write_text(text, encoding="utf-8")


def entry(command: str, path: Path, *, machine: str, **figures: float) -> str:
    """Format the TOML text, whatever characters the command line and the path hold."""
    return _TEMPLATE.format(
        machine=_printable(machine),
        command=_printable(command),
        path=_printable(str(path)),
        # TOML's basic strings are escaped as JSON's are.
        source=json.dumps(f"measured: {_printable(command)}"),
        entry=ENTRY,
        num_short=SHORT_PROMPT,
        num_long=LONG_PROMPT,
        **figures,
    )


def _printable(text: str) -> str:
    """Keep a text on one line: a comment ends with it."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _step_seconds(model: str, core: int, say: Callable[[str], None]) -> tuple[float, float]:
    """Time the first token of one prompt alone, short and long, on a stock server of one core."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dwdp-calibrate-")))
        client = stack.enter_context(BenchClient([core], folder / "client.log"))
        arguments = [model, "--served-model-name", "m", *SERVE_ARGUMENTS, *SERVE_ARGUMENTS_CPU]
        environment = {"VLLM_CPU_OMP_THREADS_BIND": str(core)}
        server = stack.enter_context(Server(arguments, folder / "server.log", environment))
        server.wait_until_ready()
        client.wait_until_ready()
        best = []
        for tokens in (SHORT_PROMPT, LONG_PROMPT):
            stream = Stream(
                input_tokens=tokens, output_tokens=1, concurrency=1, num_prompts=2 * REPEATS
            )
            result = folder / f"{tokens}.json"
            client.begin(stream.arguments(server.url, model, result, seed=0))
            best.append(min(read_stream(client.finish(result)).ttft_s))
            say(f"a prompt of {tokens} tokens alone: {1e3 * best[-1]:.0f} ms")
    return best[0], best[1]


def products_per_s(shape: ModelShape, seconds: float, attention_tflops: float) -> float:
    """Return operations per second of all matrix products, by the seconds that a longer prompt adds.

    Raises:
        DwdpConfigError: the longer prompt added too little for its products: other work disturbed the
            measurement.
    """
    per_token = 2 * (
        shape.num_layers * shape.attention_params
        + shape.num_moe_layers
        * (shape.experts_per_token * shape.expert_params + shape.shared_params)
    )
    keys = (LONG_PROMPT**2 - SHORT_PROMPT**2) / 2
    attention = 2 * keys * shape.core_dim * shape.num_layers / (attention_tflops * 1e12)
    if seconds <= attention:
        raise DwdpConfigError(
            f"calibrate: a prompt of {LONG_PROMPT} tokens took {1e3 * seconds:.0f} ms longer than one "
            f"of {SHORT_PROMPT}, which is less than its attention alone. Something else ran meanwhile; "
            "measure again when the machine is idle."
        )
    return per_token * (LONG_PROMPT - SHORT_PROMPT) / (seconds - attention)


def _micro(core: int, say: Callable[[str], None]) -> dict[str, float]:
    """Measure peaks in TFLOP/s and GB/s of one core, and what attention and reads reach of them."""
    import torch

    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    try:
        peak = max(
            2e-12 * size**3 / _best(_product(torch.randn(size, size))) for size in GEMM_SIZES
        )
        query = torch.randn(1, HEADS, NUM_KEYS, HEAD_SIZE).to(torch.bfloat16)
        attend = torch.nn.functional.scaled_dot_product_attention
        seconds = _best(lambda: attend(query, query, query, is_causal=True))
        source, target = (torch.ones(COPY_BYTES // 4) for _ in range(2))
        read = 1e-9 * COPY_BYTES / _best(source.sum)
        copy = 1e-9 * COPY_BYTES / _best(lambda: target.copy_(source))
    finally:
        torch.set_num_threads(threads)
        os.sched_setaffinity(0, cores)
    say(f"products {1e3 * peak:.0f} GFLOP/s, memory {read:.1f} GB/s read, {copy:.1f} GB/s copied")
    attention = 2e-12 * HEADS * HEAD_SIZE * NUM_KEYS**2 / seconds / peak
    return {
        "gemm": peak,
        "attention": attention,
        "read": read,
        "copy": copy,
        "direct": read / copy,
    }


def _product(matrix: Any) -> Callable[[], object]:
    return lambda: matrix @ matrix


def _best(run: Callable[[], object]) -> float:
    """Time the fastest of several runs, after one to warm up."""
    run()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)
