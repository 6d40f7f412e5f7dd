"""Tokens per second of two DWDP ranks against what else the same two cores can run.

    python benchmarks/throughput.py [--rounds 5] [--model qwen3_moe ...]

Variants, all serving one checkpoint of random weights whose experts exceed the caches:

    auto       two ranks share one copy of the experts (read in place on the host device)
    prefetch   the same, copied layer by layer into slots
    replica    two independent ranks with a full copy each
    stock      two stock vLLM servers, one core each
    tp2        one stock vLLM server with --tensor-parallel-size 2

All servers run from the start to the end; those that are not measured are stopped (SIGSTOP). Every
round measures each variant once, in a rotating order, so that ratios compare runs minutes apart at
most. Prints tokens/s and the ratio of `auto` to each variant: median [lowest - highest] of rounds.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from rich.console import Console
from rich.table import Table

from vllm_dwdp.testing.checkpoints import make_checkpoint
from vllm_dwdp.testing.machine import describe_machine
from vllm_dwdp.testing.server import Server

VARIANTS = ("auto", "prefetch", "replica", "stock", "tp2")
DWDP = ("--distributed-executor-backend", "dwdp", "--data-parallel-size", "2")
console = Console()


@dataclass(frozen=True)
class Load:
    """Closed-loop load: `concurrency` requests at a time until `num_requests` are done."""

    num_requests: int
    concurrency: int
    input_tokens: int
    output_tokens: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--intermediate-size", type=int, default=256, help="of an expert")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--input-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "dwdp-bench")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    model = make_checkpoint(
        options.folder / f"{options.hidden_size}x{options.intermediate_size}x{options.layers}"
        f"x{options.experts}",
        "qwen3_moe",
        options.experts,
        hidden_size=options.hidden_size,
        moe_intermediate_size=options.intermediate_size,
        num_hidden_layers=options.layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        num_experts_per_tok=8,
    )
    load = Load(options.requests, options.concurrency, options.input_tokens, options.output_tokens)
    with ExitStack() as stack:
        servers = start_all(stack, options.variants, str(model), options.folder)
        rates = measure(servers, load, options.rounds)
    report(rates, options.json)


def start_all(
    stack: ExitStack, variants: list[str], model: str, folder: Path
) -> dict[str, list[Server]]:
    """Start the variants one after the other and stop each (SIGSTOP) once it answers."""
    servers: dict[str, list[Server]] = {}
    for variant in variants:
        started = time.monotonic()
        servers[variant] = [
            stack.enter_context(server) for server in make_servers(variant, model, folder)
        ]
        for server in servers[variant]:
            server.wait_until_ready()
            stack.callback(server.resume)
            server.suspend()
        console.print(f"{variant:<9} answers after {time.monotonic() - started:.0f} s")
    return servers


def make_servers(variant: str, model: str, folder: Path) -> list[Server]:
    common = [model, "--served-model-name", "m", "--max-model-len", "1024"]
    common += ["--kv-cache-memory-bytes", str(256 * 2**20), "--no-enable-prefix-caching"]
    log = folder / f"{variant}.log"
    if variant == "stock":
        return [
            Server(common, folder / f"stock{core}.log", {"VLLM_CPU_OMP_THREADS_BIND": str(core)})
            for core in (0, 1)
        ]
    if variant == "tp2":
        environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
        return [Server([*common, "--tensor-parallel-size", "2"], log, environment)]
    config = json.dumps({"dwdp": {"mode": variant}})
    arguments = [*common, *DWDP, "--api-server-count", "1", "--additional-config", config]
    return [Server(arguments, log, {})]


def measure(servers: dict[str, list[Server]], load: Load, rounds: int) -> dict[str, list[float]]:
    """Tokens/s of each variant in each round, after one round to warm up."""
    rates: dict[str, list[float]] = {variant: [] for variant in servers}
    names = list(servers)
    for number in range(rounds + 1):
        order = names[number % len(names) :] + names[: number % len(names)]
        for variant in order:
            for server in servers[variant]:
                server.resume()
            rate = asyncio.run(drive([s.url for s in servers[variant]], load, number))
            for server in servers[variant]:
                server.suspend()
            if number > 0:
                rates[variant].append(rate)
                console.print(f"round {number}: {variant:<9} {rate:7.1f} tokens/s")
    return rates


async def drive(urls: list[str], load: Load, seed: int) -> float:
    """Generated tokens per second."""
    limit = asyncio.Semaphore(load.concurrency)
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(timeout=timeout) as session:

        async def one(index: int) -> int:
            prompt = [(7 + seed * 131 + index * 17 + 3 * n) % 500 for n in range(load.input_tokens)]
            body = {"model": "m", "prompt": prompt, "max_tokens": load.output_tokens}
            body |= {"temperature": 0, "ignore_eos": True}
            url = f"{urls[index % len(urls)]}/v1/completions"
            async with limit, session.post(url, json=body) as response:
                response.raise_for_status()
                return int((await response.json())["usage"]["completion_tokens"])

        started = time.monotonic()
        tokens = await asyncio.gather(*(one(index) for index in range(load.num_requests)))
    return sum(tokens) / (time.monotonic() - started)


def report(rates: dict[str, list[float]], path: Path | None) -> None:
    reference = next(iter(rates))
    table = Table(title=describe_machine())
    for heading in ("variant", "tokens/s", f"{reference} / variant"):
        table.add_column(heading, justify="right")
    for variant, values in rates.items():
        ratios = [ours / theirs for ours, theirs in zip(rates[reference], values, strict=True)]
        table.add_row(
            variant,
            f"{statistics.median(values):.1f}",
            f"{statistics.median(ratios):.2f} [{min(ratios):.2f} - {max(ratios):.2f}]",
        )
    console.print(table)
    if path is not None:
        path.write_text(
            json.dumps({"machine": describe_machine(), "tokens_per_s": rates}, indent=1)
        )


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
    main()
