"""Tokens per second of two DWDP ranks against what else the same two cores can run.

    python benchmarks/throughput.py [--rounds 5] [--model qwen3_moe ...]

Variants, all serving one checkpoint of random weights whose experts exceed the caches:

    auto       two ranks share one copy of the experts (read in place on the host device)
    prefetch   the same, copied layer by layer into slots
    replica    two independent ranks with a full copy each
    stock      two stock vLLM servers, one core each
    tp2        one stock vLLM server with --tensor-parallel-size 2

`auto` runs from the start to the end, each baseline beside it in turn; whoever is not measured is
stopped (SIGSTOP). Each round measures both, one after the other, so that a ratio compares runs that
are seconds apart. Prints tokens/s and the ratio auto / baseline: median [lowest - highest].
"""

import argparse
import asyncio
import json
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

BASELINES = ("replica", "stock", "tp2", "prefetch")
DWDP = ("--distributed-executor-backend", "dwdp", "--data-parallel-size", "2")
console = Console()

Rates = dict[tuple[str, str], list[tuple[float, float]]]
"""Tokens/s of `auto` and the baseline in each round, by (baseline, load)."""


@dataclass(frozen=True)
class Load:
    """Closed-loop load: `concurrency` requests at a time until `num_requests` are done."""

    input_tokens: int
    output_tokens: int
    concurrency: int
    num_requests: int

    @classmethod
    def parse(cls, text: str) -> "Load":
        """Read `INPUT/OUTPUTxCONCURRENCY:REQUESTS`, e.g. `64/32x16:32`."""
        tokens, _, rest = text.partition("x")
        concurrency, _, num_requests = rest.partition(":")
        given, _, wanted = tokens.partition("/")
        return cls(int(given), int(wanted), int(concurrency), int(num_requests))

    def __str__(self) -> str:
        return f"{self.input_tokens}/{self.output_tokens} x{self.concurrency}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--baselines", nargs="+", choices=BASELINES, default=BASELINES)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--intermediate-size", type=int, default=256, help="of an expert")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument(
        "--loads",
        nargs="+",
        type=Load.parse,
        default=[Load.parse(text) for text in ("32/64x2:4", "64/32x16:32", "512/1x8:16")],
        help="INPUT/OUTPUTxCONCURRENCY:REQUESTS; the default is few decodes, mixed, prefill only",
    )
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
    rates: Rates = {}
    with ExitStack() as stack:
        ours = start(stack, "auto", str(model), options.folder)
        for baseline in options.baselines:
            with ExitStack() as beside:
                theirs = start(beside, baseline, str(model), options.folder)
                for load in options.loads:
                    console.print(f"{load} tokens against {baseline}")
                    rates[baseline, str(load)] = compare(ours, theirs, load, options.rounds)
    report(rates, options.json)


def start(stack: ExitStack, variant: str, model: str, folder: Path) -> list[Server]:
    """Start a variant and stop it (SIGSTOP) once it answers."""
    started = time.monotonic()
    servers = make_servers(variant, model, folder)
    for server in servers:
        stack.enter_context(server)
    for server in servers:
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


def compare(
    ours: list[Server], theirs: list[Server], load: Load, rounds: int
) -> list[tuple[float, float]]:
    """Tokens/s of both in each round, after one round to warm up."""
    rates = []
    for number in range(rounds + 1):
        pair = (measure(ours, load, number), measure(theirs, load, number))
        if number > 0:
            rates.append(pair)
            console.print(f"round {number}: {pair[0]:7.1f} against {pair[1]:7.1f} tokens/s")
    return rates


def measure(servers: list[Server], load: Load, seed: int) -> float:
    """Tokens/s of one variant, which runs only meanwhile."""
    for server in servers:
        server.resume()
    rate = asyncio.run(drive([server.url for server in servers], load, seed))
    for server in servers:
        server.suspend()
    return rate


async def drive(urls: list[str], load: Load, seed: int) -> float:
    """Tokens per second: generated ones, or prompt tokens where only one is generated."""
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
                usage = (await response.json())["usage"]
                return int(
                    usage["completion_tokens" if load.output_tokens > 1 else "prompt_tokens"]
                )

        started = time.monotonic()
        tokens = await asyncio.gather(*(one(index) for index in range(load.num_requests)))
    return sum(tokens) / (time.monotonic() - started)


def report(rates: Rates, path: Path | None) -> None:
    table = Table(title=describe_machine())
    for heading in (
        "baseline",
        "in/out, at once",
        "auto, tokens/s",
        "baseline, tokens/s",
        "auto / baseline",
    ):
        table.add_column(heading, justify="right")
    for (baseline, load), pairs in rates.items():
        ratios = [ours / theirs for ours, theirs in pairs]
        table.add_row(
            baseline,
            load,
            f"{statistics.median(ours for ours, _ in pairs):.1f}",
            f"{statistics.median(theirs for _, theirs in pairs):.1f}",
            f"{statistics.median(ratios):.2f} [{min(ratios):.2f} - {max(ratios):.2f}]",
        )
    console.print(table)
    if path is not None:
        rows = [{"baseline": b, "load": load, "rounds": r} for (b, load), r in rates.items()]
        path.write_text(json.dumps({"machine": describe_machine(), "tokens_per_s": rows}, indent=1))


if __name__ == "__main__":
    main()
