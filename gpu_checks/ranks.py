"""Questions about ranks in processes of their own, which are told over standard input what to do.

`Rank` is the parent's side; run as a module, this file is the rank: it builds its shard, meets its
group through the product's `Membership`, maps its peers and answers each command with a line.
"""

import contextlib
import faulthandler
import json
import os
import selectors
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
NUM_LAYERS = 3
START_S, ANSWER_S = 120, 60


class Rank:
    """A started rank.

    Args:
        number: of the rank.
        module: what it runs, with `arguments`.
        log: for what it writes to its standard error; by default it is shown.
    """

    def __init__(
        self, number: int, module: str, *arguments: str, log: IO[bytes] | None = None
    ) -> None:
        self.number = number
        self._text = b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )

    @classmethod
    def start_group(cls, size: int, stack: contextlib.ExitStack) -> list["Rank"]:
        """Start ranks and wait until they have met; the stack ends them."""
        from vllm_dwdp.distributed.meeting import make_abstract_endpoint

        endpoint = str(make_abstract_endpoint())
        ranks = [cls(number, __name__, str(number), str(size), endpoint) for number in range(size)]
        for rank in ranks:
            stack.callback(rank.end)
        for rank in ranks:
            answer = rank.answer(START_S)
            assert answer["met"] == size - 1, answer
        return ranks

    def ask(self, command: str, timeout_s: float = ANSWER_S) -> dict[str, Any]:
        """Give a command and return the rank's answer, which must be good."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n".encode())
        self.process.stdin.flush()
        answer = self.answer(timeout_s)
        assert answer["ok"], f"rank {self.number}, {command}: {answer}"
        return answer

    def answer(self, timeout_s: float) -> dict[str, Any]:
        """Return the next line that is JSON; others are shown."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while True:
                line, newline, rest = self._text.partition(b"\n")
                if newline:
                    self._text = rest
                    if line.startswith(b"{"):
                        found: dict[str, Any] = json.loads(line)
                        return found
                    print(f"rank {self.number}: {line.decode(errors='replace')}")
                    continue
                left = deadline - time.monotonic()
                assert left > 0, f"rank {self.number} said nothing for {timeout_s} s"
                if selector.select(left):
                    data = os.read(self.process.stdout.fileno(), 65536)
                    assert data, f"rank {self.number} ended with {self.process.wait()}"
                    self._text += data

    def end(self) -> None:
        """Kill the rank, whatever state it is in."""
        self.process.kill()
        self.process.wait()


def ranks_meet(end: str) -> str:
    """Let three ranks check every layer, and the survivors of a kill do so again."""
    with contextlib.ExitStack() as stack:
        ranks = Rank.start_group(3, stack)
        for _round in range(2):
            for rank in ranks:
                rank.ask("check")
        if end == "and_one_is_killed":
            killed = ranks.pop(1)
            killed.process.kill()
            killed.process.wait()
            for rank in ranks:
                rank.ask("spend")  # take what the driver might have freed
                for _round in range(2):
                    rank.ask("check")
        for rank in ranks:
            rank.ask("close")
            assert rank.process.wait(timeout=60) == 0
    return f"all is right, as seen by {len(ranks)} ranks to the end"


# --- the rank's process --------------------------------------------------------------------------


def say(**content: Any) -> None:
    """Answer the parent."""
    print(json.dumps(content), flush=True)


def fingerprint(size: int, page_bytes: int) -> Any:
    """Return the fingerprint of every rank; that they are equal is all that matters here."""
    from vllm_dwdp.distributed.fingerprint import Fingerprint

    same = dict.fromkeys(
        ("model", "revision", "checkpoint_digest", "config_digest", "dtype", "quantization"),
        "made up",
    )
    return Fingerprint(
        **same,
        group_size=size,
        experts_per_rank=0,
        tensor_slice="0 of 1",
        page_bytes=page_bytes,
        vllm_version="none",
        plugin_version="none",
    )


def check(rank: Any, direct: Any, rings: Any, gpu: Any) -> list[str]:
    """Name what is wrong with either view of any layer."""
    import torch

    from gpu_checks.expert_ranks import wrong_weights
    from vllm_dwdp.model_executor import ops

    tick = torch.zeros(1, device=gpu.device)
    wrong = []
    for layer in range(NUM_LAYERS):
        expected = rank.whole(layer)
        wrong += [f"direct {layer} {name}" for name in wrong_weights(direct[layer], expected)]
        ops.wait_layer(tick, 0, layer)
        wrong += [f"ring {layer} {name}" for name in wrong_weights(rings.views[layer], expected)]
        ops.record_layer(tick, 0, layer)
    return wrong


def main() -> None:
    """Run one rank."""
    faulthandler.enable()
    number, size, endpoint = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    import torch

    from gpu_checks.accelerator import accelerator
    from gpu_checks.expert_ranks import RankMemory
    from gpu_checks.ring_check import provoke_races
    from gpu_checks.views import SHAPE
    from vllm_dwdp.distributed.meeting import parse_endpoint
    from vllm_dwdp.distributed.membership import Membership
    from vllm_dwdp.model_executor.peers import handles_of

    provoke_races(300)
    gpu = accelerator()
    spent = []
    with contextlib.ExitStack() as stack:
        memory = stack.enter_context(contextlib.closing(gpu.open_memory()))
        rank = stack.enter_context(
            contextlib.closing(RankMemory(memory, SHAPE, NUM_LAYERS, number, size))
        )
        membership = stack.enter_context(
            Membership.join(
                parse_endpoint(endpoint),
                group=0,
                dwdp_rank=number,
                group_size=size,
                fingerprint=fingerprint(size, memory.page_bytes),
                join_timeout_s=START_S - 20,
            )
        )
        handles = rank.shard.memory.export()
        membership.publish(handles.fds, handles.num_bytes, handles.fabric)
        handles.close()
        met = membership.meet()
        for peer, shard in met.items():
            assert shard.handle_bytes == rank.handle_bytes(peer)
        rank.connect({peer: memory.open_peer(handles_of(shard)) for peer, shard in met.items()})
        membership.announce_ready(rank.shard.memory.digest())
        assert not membership.wait_ready()
        direct, rings = rank.direct_views(), rank.rings()
        rank.shard.memory.finish()
        say(met=len(met))
        for line in sys.stdin:
            command = line.strip()
            wrong = check(rank, direct, rings, gpu) if command == "check" else []
            if command == "spend":
                size_bytes = 2**20 if not gpu.is_real else 2**28
                spent.append(torch.full((size_bytes,), 7, dtype=torch.uint8, device=gpu.device))
            if command == "close":
                break
            say(ok=not wrong, wrong=wrong)
        gpu.synchronize()
        rings.queue.drain()
    say(ok=True, closed=True)


if __name__ == "__main__":
    main()
