"""`make demo`: two ranks share one copy of a model's experts, answer, and outlive each other.

Starts `vllm-dwdp launch` with two ranks of a small model that speaks (speaking_model.py; random
weights where it cannot be downloaded), asks both at once, shows what they share, kills one with SIGKILL
while the other answers on, and waits for its return. Ends 0, or 1 with the last words of the log.

    DEMO_LOGS=folder     for the servers' logs; by default in the cache folder
    DEMO_SVG=file.svg    takes a picture of what it shows
"""

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import psutil
import speaking_model
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from vllm_dwdp.device.limits import proportional_set_bytes
from vllm_dwdp.entrypoints.bench.checkpoints import make_checkpoint
from vllm_dwdp.entrypoints.cli.status import find_ranks
from vllm_dwdp.entrypoints.launch.server import Server, ServerError
from vllm_dwdp.layout.placement import Placement

NUM_EXPERTS = 4
NUM_RANKS = 2
RANDOM_SHAPE = {"hidden_size": 512, "moe_intermediate_size": 256, "num_hidden_layers": 8}
LOGS = Path(os.environ.get("DEMO_LOGS") or speaking_model.cache_folder() / "demo-logs")
LAUNCH = (sys.executable, "-m", "vllm_dwdp.entrypoints.cli.main", "launch")
START_TIMEOUT_S = 280
RETURN_TIMEOUT_S = 120
QUESTIONS = (
    ("What is the capital of France?", "What is 2+2?"),
    ("How many legs does a spider have?", "What is the boiling point of water in Celsius?"),
)
"""Of each rank's client."""
MEANWHILE = (
    "What is a hash table?",
    "Why is the sky blue? Answer in one sentence.",
    "Who wrote Romeo and Juliet?",
)
WHERE_TO_GO = """\
your own model      .venv/bin/vllm-dwdp launch MODEL --ranks 2
                    .venv/bin/vllm serve MODEL --distributed-executor-backend dwdp --data-parallel-size 2
does it pay off?    .venv/bin/vllm-dwdp plan --model MODEL/config.json --gpu gb200 --ranks 4
how it works        docs/design.md
what was measured   docs/performance.md"""

PICTURE = os.environ.get("DEMO_SVG", "")
# Moving pictures would be recorded frame by frame.
console = Console(record=bool(PICTURE), force_terminal=False if PICTURE else None, highlight=False)
Report = Callable[[str], None]


def main() -> int:
    """Run the demo; its exit status."""
    started = time.monotonic()
    headline("1/5  a model")
    with progress() as report:
        model = find_model(report)
    headline("2/5  two ranks, each an independent vLLM server")
    with Launch(model) as launch:
        with progress() as report:
            launch.wait_until_all_serve(report)
        headline("3/5  both answer at once")
        first = show_answers(launch)
        headline("4/5  what they share")
        show_shared(launch)
        headline("5/5  rank 1 is killed with SIGKILL, rank 0 answers on, rank 1 comes back")
        show_death_and_return(launch, before=first)
        family = psutil.Process(launch.server.process.pid).children(recursive=True)
    left = [process.pid for process in psutil.wait_procs(family, timeout=20)[1]]
    if left:
        raise SystemExit(f"processes left behind: {left}")
    console.print()
    console.print(Panel(Text(WHERE_TO_GO), title="where to go next", expand=False))
    console.print(f"done in {time.monotonic() - started:.0f} s; no process left behind")
    if PICTURE:
        picture = console.export_svg(title="make demo")
        # Fonts from another server: a reader of the picture shall not ask it for them.
        picture = re.sub(r"@font-face \{.*?\}", "", picture, flags=re.DOTALL)
        Path(PICTURE).write_text(picture)
    return 0


def headline(text: str) -> None:
    console.print(f"\n[bold cyan]{text}[/]")


@contextlib.contextmanager
def progress() -> Iterator[Report]:
    """Print each line that is reported; on a terminal the last one runs on with a clock."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    started = time.monotonic()
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("...")

        def report(line: str) -> None:
            text = Text(f"{time.monotonic() - started:4.0f} s  {line}", overflow="fold")
            console.print(text)
            bar.reset(task, description="...")

        yield report


def find_model(report: Report) -> Path:
    """Return the model that speaks, or one of random weights where it cannot be had."""
    try:
        folder = speaking_model.speaking_model(NUM_EXPERTS, report)
    except speaking_model.ModelUnavailableError as error:
        report(f"{error}.")
        report(
            "so this demo takes a model of random weights: its answers are random, all else is real"
        )
        folder = speaking_model.cache_folder() / "random-qwen3-moe"
        return make_checkpoint(folder, NUM_EXPERTS, **RANDOM_SHAPE)
    report(f"SmolLM2-135M-Instruct with {NUM_EXPERTS} experts a layer, in {folder}")
    return folder


class Launch:
    """A running `vllm-dwdp launch` of two ranks; a context manager that ends it."""

    def __init__(self, model: Path) -> None:
        arguments = [str(model), "--ranks", str(NUM_RANKS), "--logs", str(LOGS)]
        arguments += ["--served-model-name", "demo", "--max-model-len", "1024", "--enforce-eager"]
        settings = {"COLUMNS": "400", "VLLM_LOGGING_COLOR": "0"}
        self.server = Server(arguments, LOGS / "launch.log", settings, program=LAUNCH)
        self._shown = 0

    def __enter__(self) -> "Launch":
        return self

    def __exit__(self, *error: object) -> None:
        self.server.stop()

    def new_lines(self) -> list[str]:
        """Return what launch has said since the last call.

        Raises:
            SystemExit: it has ended.
        """
        lines = self.server.log.read_text(errors="replace").splitlines()
        new, self._shown = lines[self._shown :], len(lines)
        try:
            self.server.is_ready()
        except ServerError as error:
            raise SystemExit(str(error)) from error
        return new

    def wait_until_all_serve(self, report: Report) -> None:
        """Report what launch says until every rank answers.

        Raises:
            SystemExit: it took too long.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            for line in self.new_lines():
                report(line)
                if line.startswith(f"all {NUM_RANKS} ranks serve"):
                    return
            time.sleep(0.25)
        raise SystemExit(f"the ranks did not serve within {START_TIMEOUT_S} s; see {LOGS}")

    @property
    def urls(self) -> list[str]:
        """Of each rank."""
        found = re.search(r"ranks will listen at (.*); each", self.server.log.read_text())
        assert found is not None
        return found[1].split(", ")

    def status(self) -> list[dict[str, Any]]:
        """Of each rank, as `vllm-dwdp status` shows it."""
        found = re.search(r"ranks meet at (\S+);", self.server.log.read_text())
        assert found is not None
        every = find_ranks(found[1], secret_file=None, group_size=NUM_RANKS, num_groups=1)
        return [entry for entry in every if entry["dwdp_rank"] in range(NUM_RANKS)]

    def front_end(self, rank: int) -> psutil.Process:
        """Return the process of a rank that launch started, and that leads its process group."""
        children = psutil.Process(self.server.process.pid).children()
        words = f"--data-parallel-rank {rank}"
        return next(child for child in children if words in " ".join(child.cmdline()))


class Client(threading.Thread):
    """Asks one rank question after question, and keeps what has been answered so far."""

    def __init__(self, url: str, questions: Sequence[str], max_tokens: int, repeat: bool = False):
        super().__init__(daemon=True)
        self.answers: list[list[str]] = []
        """Question, and answer so far."""
        self.num_tokens = 0
        self.seconds = 0.0
        self.failure = ""
        self._openai = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        self._questions, self._max_tokens, self._repeat = questions, max_tokens, repeat
        self._ended = threading.Event()
        self.start()

    def run(self) -> None:
        started = time.monotonic()
        try:
            while not self._ended.is_set():
                for question in self._questions:
                    self._ask(question)
                if not self._repeat:
                    break
        except openai.OpenAIError as error:
            self.failure = str(error)
        self.seconds = time.monotonic() - started

    def _ask(self, question: str) -> None:
        self.answers.append([question, ""])
        stream = self._openai.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": question}],
            max_tokens=self._max_tokens,
            temperature=0,
            stream=True,
        )
        for part in stream:
            if part.choices and (text := part.choices[0].delta.content):
                self.answers[-1][1] += text
                self.num_tokens += 1

    def end(self) -> None:
        """Let the running answer finish.

        Raises:
            SystemExit: a request failed.
        """
        self._ended.set()
        self.join(timeout=120)
        if self.failure:
            raise SystemExit(f"a request failed: {self.failure}")


def show_answers(launch: Launch) -> str:
    """Ask both ranks at once, show the words as they come, and return the first answer of rank 1."""
    for client in [Client(url, ["Hello!"], max_tokens=2) for url in launch.urls]:
        client.end()  # the first tokens of a start are slow
    clients = [
        Client(url, asked, max_tokens=40) for url, asked in zip(launch.urls, QUESTIONS, strict=True)
    ]
    with Live(console=console, refresh_per_second=8) as live:
        while any(client.is_alive() for client in clients):
            live.update(conversation(clients))
            time.sleep(0.1)
        live.update(conversation(clients))
    end_of_picture()
    for client in clients:
        client.end()
    rates = " and ".join(f"{client.num_tokens / client.seconds:.0f}" for client in clients)
    console.print(f"  {rates} tokens/s; neither rank waits for the other")
    return clients[1].answers[0][1]


def end_of_picture() -> None:
    """Begin a new line: where a picture does not move, rich ends without one."""
    if not console.is_terminal:
        console.print()


def conversation(clients: Sequence[Client]) -> Table:
    """Return a column for each rank."""
    table = Table(show_edge=False, padding=(0, 2), expand=True)
    for rank in range(len(clients)):
        table.add_column(f"rank {rank}", ratio=1)
    for row in range(max(len(client.answers) for client in clients)):
        cells = []
        for client in clients:
            question, answer = client.answers[row] if row < len(client.answers) else ("", "")
            cells.append(Text.assemble((question, "dim"), f"\n{answer.strip()}\n"))
        table.add_row(*cells)
    return table


def show_shared(launch: Launch) -> None:
    """Draw each rank's memory, with what is its own and what it reads from the other."""
    ranks = launch.status()
    held = Placement(num_experts=NUM_EXPERTS, group_size=NUM_RANKS).resident
    names = [f"experts {each.start}-{each.stop - 1}" for each in held]
    boxes = [
        memory_picture(rank, mine=names[number], theirs=names[1 - number], peer=1 - number)
        for number, rank in enumerate(ranks)
    ]
    picture = Table.grid(padding=(0, 1))
    picture.add_row(boxes[0], Text("\n\n\n\n◄────►\nread in\nplace"), boxes[1])
    console.print(picture)
    used = sum(proportional_set_bytes(rank["pid"]) for rank in ranks)
    saved = sum(rank["saved_bytes"] for rank in ranks)
    console.print(
        f"  memory of both ranks: {mib(used)} measured (proportional set size, with 1 GiB "
        f"of KV cache each); as two full replicas {mib(used + saved)}"
    )


def memory_picture(rank: dict[str, Any], mine: str, theirs: str, peer: int) -> Panel:
    """One rank: attention of its own, its experts, and its peer's experts as it sees them."""
    rows = Table.grid(padding=(0, 1))
    rows.add_row(Text("█", style="green"), Text("attention, router, KV cache"))
    rows.add_row("", "")
    held, remote = mib(rank["resident_expert_bytes"]), mib(rank["remote_expert_bytes"])
    rows.add_row(Text("█", style="cyan"), Text(f"{mine}: held here, {held}"))
    rows.add_row(Text("░", style="magenta"), Text(f"{theirs}: in rank {peer}, {remote}"))
    title = f"rank {rank['dwdp_rank']}, process {rank['pid']}"
    return Panel(rows, title=title, expand=False, padding=(1, 1))


def show_death_and_return(launch: Launch, before: str) -> None:
    """Kill rank 1 while a client of rank 0 goes on, until rank 1 answers as it did before.

    Raises:
        SystemExit: rank 1 did not come back in time.
    """
    client = Client(launch.urls[0], MEANWHILE, max_tokens=60, repeat=True)
    with Live(console=console, refresh_per_second=8) as live:
        launch.new_lines()
        killed_at, happened = time.monotonic(), [f"kill -9 {launch.front_end(1).pid}"]
        os.killpg(launch.front_end(1).pid, signal.SIGKILL)
        is_back = False
        while not is_back:
            seconds = time.monotonic() - killed_at
            if seconds > RETURN_TIMEOUT_S:
                raise SystemExit(
                    f"rank 1 did not come back within {RETURN_TIMEOUT_S} s; see {LOGS}"
                )
            said = [line for line in launch.new_lines() if line.startswith("rank 1")]
            happened += [f"{seconds:4.1f} s  {line.removeprefix('rank 1: ')}" for line in said]
            is_back = any("rank 1: serving" in line for line in said)
            live.update(survivor(client, happened, seconds))
            time.sleep(0.1)
        num_tokens = client.num_tokens
        again = Client(launch.urls[1], QUESTIONS[1][:1], max_tokens=40)
        again.end()
        live.update(survivor(client, happened, seconds))
    end_of_picture()
    client.end()
    answer = again.answers[0][1]
    rank = launch.status()[1]
    console.print(f"  rank 0 generated {num_tokens} tokens meanwhile; none of its requests failed")
    console.print(
        f"  rank 1 adopted its {mib(rank['resident_expert_bytes'])} of experts from memory that rank 0 "
        f"had kept, and read {mib(rank['read_expert_bytes'])} from disk"
    )
    same = (
        "the same answer as before" if answer == before else f"another answer than before: {before}"
    )
    console.print(Text(f"  rank 1 says: {answer.strip()}  ({same})"))


def survivor(client: Client, happened: Sequence[str], seconds: float) -> Table:
    """Draw what rank 0 answers, beside what became of rank 1."""
    table = Table(show_edge=False, padding=(0, 2), expand=True)
    table.add_column(f"rank 0: {client.num_tokens} tokens", ratio=1)
    table.add_column(f"rank 1, {seconds:.0f} s after its death", ratio=1)
    question, answer = client.answers[-1] if client.answers else ("", "")
    table.add_row(
        Text.assemble((question, "dim"), f"\n{answer.strip()}"), Text("\n".join(happened))
    )
    return table


def mib(num_bytes: float) -> str:
    """Format an amount of memory."""
    return f"{num_bytes / 2**20:.0f} MiB"


if __name__ == "__main__":
    sys.exit(main())
