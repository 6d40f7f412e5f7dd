"""`make demo`: two independent ranks share one copy of a small MoE model's experts.

Makes a checkpoint of random weights, starts `vllm serve` with the dwdp backend, talks to it with
the official `openai` client and shows who answered and what memory was saved. Ends 0, or 1 with the
server's last words.
"""

import asyncio
import contextlib
import os
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from vllm_dwdp.device.limits import proportional_set_bytes
from vllm_dwdp.entrypoints.bench.checkpoints import make_checkpoint
from vllm_dwdp.entrypoints.launch.server import Server, ServerError

NUM_RANKS = 2
CHECKPOINT = Path(os.environ.get("DEMO_CHECKPOINT", "/tmp/vllm-dwdp-demo/qwen3-moe"))
SHAPE = {"hidden_size": 512, "moe_intermediate_size": 256, "num_hidden_layers": 8}
NUM_EXPERTS = 64
START_TIMEOUT_S = 240
PHASES = ("loaded", "met its", "serves in", "Application startup complete")

console = Console()


def main() -> int:
    started = time.monotonic()
    step(f"checkpoint: Qwen3-MoE, {NUM_EXPERTS} experts, random weights -> {CHECKPOINT}")
    make_checkpoint(CHECKPOINT, NUM_EXPERTS, **SHAPE)
    with serve() as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        model = client.models.list().data[0].id
        show_answers(client, model)
        show_throughput(asyncio.run(many_requests(server.url, model)))
        metrics = read_metrics(server.url)
        show_ranks(metrics)
        show_memory(server, metrics)
        family = psutil.Process(server.process.pid).children(recursive=True)
    left = [process.pid for process in psutil.wait_procs(family, timeout=20)[1]]
    if left:
        console.print(f"[red]processes left behind: {left}[/]")
        return 1
    step(f"done in {time.monotonic() - started:.0f} s; no process left behind")
    return 0


def step(text: str) -> None:
    console.print(f"[bold cyan]==>[/] {text}")


@contextlib.contextmanager
def serve() -> Iterator[Server]:
    """Start the server, show what its ranks report while they start, stop it at the end."""
    arguments = [
        str(CHECKPOINT),
        *("--served-model-name", "demo"),
        *("--distributed-executor-backend", "dwdp"),
        *("--data-parallel-size", str(NUM_RANKS)),
        *("--max-model-len", "1024"),
    ]
    with Server(arguments, CHECKPOINT.parent / "server.log", {}) as server:
        step(" ".join(["vllm", *server.command[1:]]))
        show_start(server)
        yield server


def show_start(server: Server) -> None:
    """Return once the server answers.

    Raises:
        SystemExit: the server died or took too long.
    """
    started, shown = time.monotonic(), 0
    with console.status("starting") as status:
        while time.monotonic() - started < START_TIMEOUT_S:
            lines = server.log.read_text(errors="replace").splitlines()
            for line in lines[shown:]:
                if "DWDP rank" in line and any(phase in line for phase in PHASES):
                    console.print(f"    {line.partition('] ')[2]}")
            shown = len(lines)
            status.update(f"starting, {time.monotonic() - started:.0f} s")
            try:
                ready = server.is_ready()
            except ServerError as error:
                raise SystemExit(str(error)) from error
            if ready:
                step(f"the server answers after {time.monotonic() - started:.0f} s")
                return
            time.sleep(0.5)
    raise SystemExit(f"the server did not answer within {START_TIMEOUT_S} s; see {server.log}")


def show_answers(client: openai.OpenAI, model: str) -> None:
    """One request of each kind. The weights are random, so are the words."""
    completion = client.completions.create(
        model=model, prompt="Independent ranks", max_tokens=16, temperature=0
    )
    show("completion", completion.choices[0].text)
    streamed = client.completions.create(
        model=model, prompt="Independent ranks", max_tokens=16, temperature=0, stream=True
    )
    text = "".join(part.choices[0].text for part in streamed)
    show("completion, streamed", text)
    if text != completion.choices[0].text:
        raise SystemExit("the streamed completion differs from the plain one")
    messages = [{"role": "user", "content": "Who holds expert 7?"}]
    chat = client.chat.completions.create(
        model=model, messages=messages, max_tokens=16, temperature=0
    )
    show("chat", chat.choices[0].message.content or "")
    parts = client.chat.completions.create(
        model=model, messages=messages, max_tokens=16, temperature=0, stream=True
    )
    show("chat, streamed", "".join(part.choices[0].delta.content or "" for part in parts))


def show(kind: str, answer: str) -> None:
    console.print(f"    {kind:<21} {answer!r}", markup=False, soft_wrap=True)


async def many_requests(url: str, model: str, num_requests: int = 32) -> tuple[int, float]:
    """Several at once; returns generated tokens and seconds."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        started = time.monotonic()
        answers = await asyncio.gather(
            *(
                client.completions.create(
                    model=model,
                    prompt=f"request {index}",
                    max_tokens=32,
                    temperature=0,
                    extra_body={"ignore_eos": True},
                )
                for index in range(num_requests)
            )
        )
    seconds = time.monotonic() - started
    return sum(answer.usage.completion_tokens for answer in answers if answer.usage), seconds


def show_throughput(measured: tuple[int, float]) -> None:
    num_tokens, seconds = measured
    step(f"32 requests at once: {num_tokens} tokens, {num_tokens / seconds:.0f} tokens/s")


def read_metrics(url: str) -> dict[tuple[str, str], float]:
    """Values of `/metrics` by (metric, engine), summed over other labels."""
    time.sleep(2.5)  # the ranks' own figures are polled once a second
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        text = response.read().decode()
    values: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, sample.labels.get("engine", ""))
            values[key] = values.get(key, 0.0) + sample.value
    return values


def show_ranks(metrics: dict[tuple[str, str], float]) -> None:
    table = Table(title="who served what")
    for heading in ("rank", "requests", "tokens", "steps", "experts held", "read from peers"):
        table.add_column(heading, justify="right")
    for rank in map(str, range(NUM_RANKS)):
        table.add_row(
            rank,
            f"{metrics['vllm:request_success_total', rank]:.0f}",
            f"{metrics['vllm:generation_tokens_total', rank]:.0f}",
            f"{metrics['vllm:dwdp_steps_total', rank]:.0f}",
            mib(metrics["vllm:dwdp_resident_expert_bytes", rank]),
            mib(metrics["vllm:dwdp_remote_expert_bytes", rank]),
        )
    console.print(table)


def show_memory(server: Server, metrics: dict[tuple[str, str], float]) -> None:
    used = sum(proportional_set_bytes(rank.pid) for rank in server.ranks())
    saved = sum(metrics["vllm:dwdp_saved_bytes", str(rank)] for rank in range(NUM_RANKS))
    table = Table(title="memory of the ranks (proportional set size)")
    table.add_column("", justify="left")
    table.add_column("MiB", justify="right")
    table.add_row(f"{NUM_RANKS} ranks, one copy of the experts (measured)", mib(used))
    table.add_row("experts not stored twice", mib(saved))
    table.add_row(f"{NUM_RANKS} full replicas (the sum of the two)", mib(used + saved))
    console.print(table)


def mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.0f} MiB"


if __name__ == "__main__":
    sys.exit(main())
