"""A start that fails or is interrupted leaves nothing behind, and says why on every rank."""

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from gpu_checks.quantised import make_quantised_checkpoint
from tests.e2e.conftest import Checkpoints
from tests.e2e.matrix import run_cases
from tests.helpers import cpu_gates
from vllm_dwdp.entrypoints.launch.ports import free_ports
from vllm_dwdp.entrypoints.launch.server import VLLM

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

GATES = {"prepare": "tests.helpers.cpu_gates:open_gates"}
STEPS = {
    "making the shard": "vllm_dwdp.device.host:HostShard.append",
    "proving a layer": "vllm_dwdp.model_executor.twin:LayerTwin.process",
    "publishing a layer": "vllm_dwdp.model_executor.expert_shard:ExpertShard.publish_layer",
    "sealing": "vllm_dwdp.device.host:HostShard.seal",
    "reopening read-only": "vllm_dwdp.device.host:HostShard.export",
    "listening": "vllm_dwdp.distributed.unix:AbstractEndpoint.listen",
    "publishing": "vllm_dwdp.distributed.membership:Membership.publish",
    "meeting": "vllm_dwdp.distributed.membership:Membership.meet",
    "mapping a peer": "vllm_dwdp.model_executor.peers:PeerShards._map",
    "edges": "vllm_dwdp.model_executor.expert_shard:ExpertShard.fill_edges",
    "announcing": "vllm_dwdp.distributed.membership:Membership.announce_ready",
    "slots": "vllm_dwdp.device.host:HostSlots.__init__",
    "private rows": "vllm_dwdp.model_executor.private_rows:PrivateTensors.complete",
    "composites": "vllm_dwdp.device.host:map_composite",
    "binding": "vllm_dwdp.model_executor.routed_experts:DwdpRoutedExperts.use",
    "copy threads": "vllm_dwdp.device.host:HostCopyQueue",
    "the ring": "vllm_dwdp.model_executor.rings:Ring",
}


def test_every_step_of_a_start_failing_once(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Both ranks start again in the same processes afterwards: nothing that was left disturbs."""
    model = checkpoints("mixtral", 8)
    common = {"model": model, "num_ranks": 2, "dwdp": {"mode": "prefetch", "join_timeout_s": 6}}
    failures = [
        common | {"name": step, "fail_at": place, "fails": True} for step, place in STEPS.items()
    ]
    interrupt = {"fails": True, "fail_at": STEPS["edges"], "fail_with": "KeyboardInterrupt"}
    listed = [
        common | {"name": "before"},
        *failures,
        common | {"name": "interrupted"} | interrupt,
        common | {"name": "after"},
    ]
    results = run_cases(tmp_path, "failing", listed)
    assert results["before"][0]["tokens"] == results["after"][0]["tokens"]
    for name in [*STEPS, "interrupted"]:
        ours, theirs = results[name]
        injected = "KeyboardInterrupt" if name == "interrupted" else "injected at"
        assert injected in ours["error"], (name, ours)
        for result in (ours, theirs):
            assert not any(result["left"].values()), (name, result)
        # A rank that already listened is told why; one that did not names us at its deadline.
        assert not theirs["error"] or re.search(
            f"rank 0 of group 0 failed to start: .*{injected}|ranks \\[0\\] of group 0 did not",
            theirs["error"],
        ), (name, theirs)
    met = list(STEPS).index("slots")
    for name in list(STEPS)[:met]:
        assert results[name][1]["error"], f"rank 1 served although rank 0 failed at {name}"


def test_a_rank_killed_while_it_loads_is_named_by_the_others(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    killed = {
        "name": "killed",
        "model": checkpoints("mixtral", 8),
        "num_ranks": 2,
        "dwdp": {"join_timeout_s": 5},
        "fails": True,
        "fail_at": STEPS["publishing a layer"],
        "fail_with": "SIGKILL",
    }
    (survivor,) = run_cases(tmp_path, "killed", [killed], expected_codes=[-9, 0])["killed"]
    assert "JoinTimeoutError" in survivor["error"]
    assert "ranks [0] of group 0 did not publish their experts" in survivor["error"]
    assert not any(survivor["left"].values()), survivor


def test_models_that_cannot_be_shared_are_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    refusals = "vllm_dwdp.compat.frontend.model_refusals"
    common = {"num_ranks": 2, "dwdp": {"join_timeout_s": 20}, "fails": True}
    online = {"quantization": "fp8"}
    listed = [
        common
        | {"name": "class", "model": checkpoints("mixtral", 8)}
        | {"replace": ["vllm_dwdp.compat.worker.moe:wrappable_classes", "builtins:tuple"]},
        common
        | {"name": "method", "model": checkpoints("mixtral", 8, hidden_size=256)}
        | {"engine_args": online}
        | GATES,
        common
        | {"name": "none", "model": checkpoints("deepseek_v2", 8, first_k_dense_replace=99)}
        | {"replace": [f"{refusals}:rules_without_expert_layer", "operator:not_"]},
    ]
    results = run_cases(tmp_path, "refused", listed)
    for rank in (0, 1):
        assert re.search(
            r"MixtralForCausalLM builds its experts from RoutedExperts, whose weight loading DWDP does "
            r"not know.* Use dwdp mode \"replica\"",
            results["class"][rank]["error"],
        )
        assert re.search(
            r"layers.0.block_sparse_moe.experts: a rank cannot load its share only: "
            r"Fp8\w* quantises bf16 experts while they are loaded.* Serve a checkpoint that",
            results["method"][rank]["error"],
        )
        assert re.search(
            r"DeepseekV2ForCausalLM has built no layer with routed experts.* leave "
            r"--distributed-executor-backend dwdp out",
            results["none"][rank]["error"],
        )
        for name in results:
            assert not any(results[name][rank]["left"].values()), results[name][rank]


def test_faults_in_the_processing_of_a_layer_are_found_before_it_serves(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """Each names the tensor; none of them would be seen by sizes or names."""
    complete = "vllm_dwdp.compat.worker.moe:complete"
    common = {
        "model": checkpoints("mixtral", 8),
        "num_ranks": 2,
        "dwdp": {"join_timeout_s": 20},
        "fails": True,
    }
    expected = {
        "reduces_over_experts": "what processing makes of quant_method.w13_maximum depends on experts",
        "keeps_memory": "w2_weight was processed, but list keeps its memory",
        "differs_by_rank": r"\(.*experts.*, quant_method.a13_scale: bfloat16 \[\] .* here, .* there\)",
        "other_kernel": r"\(.*experts.*, kernel: Unquantized.*Experts here, .*Experts there\)",
    }
    listed = [
        common | {"name": name, "replace": [complete, f"tests.e2e.planted:{name}"]}
        for name in expected
    ]
    if cpu_gates.why_not() is None:
        missing = str(make_quantised_checkpoint(tmp_path / "missing", "fp8_block", 8))
        leave_out(Path(missing), "layers.1.mlp.experts.7.down_proj.weight_scale_inv")
        expected["missing"] = (
            r"the checkpoint gave no w2_weight_scale_inv \(w2\) for expert 7 \(1 of 8"
        )
        listed.append(common | {"name": "missing", "model": missing} | GATES)
    results = run_cases(tmp_path, "planted", listed)
    for name, message in expected.items():
        for result in results[name]:
            assert re.search(message, result["error"]), (name, result["error"])
            assert not any(result["left"].values()), (name, result)


def leave_out(checkpoint: Path, ending: str) -> None:
    """Take a tensor out of a checkpoint."""
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    (name,) = [name for name in tensors if name.endswith(ending)]
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})


# --- the real command ------------------------------------------------------------------------------


class Lonely:
    """`vllm serve` of a rank whose last peer never comes: it waits with its shard published."""

    def __init__(
        self, model: str, folder: Path, join_timeout_s: float = 600, *, rank: int = 0, size: int = 2
    ) -> None:
        self.meet = folder / "meet"
        self.log = folder / f"server-{rank}.log"
        self.shared_memory: set[str] = set()
        folder.mkdir(exist_ok=True)
        options = {"rendezvous": f"unix://{self.meet}", "join_timeout_s": join_timeout_s}
        command = [VLLM, "serve", model, "--enforce-eager", "--max-model-len", "512"]
        command += ["--distributed-executor-backend", "dwdp", "--data-parallel-size", str(size)]
        command += ["--data-parallel-rank", str(rank), "--port", str(free_ports(1)[0])]
        command += ["--additional-config", json.dumps({"dwdp": options})]
        environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 200
        while text not in self.log.read_text(errors="replace"):
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < deadline, self.log.read_text()[-4000:]
            time.sleep(0.2)
        self.note_shared_memory()

    def wait_for_end(self) -> None:
        deadline = time.monotonic() + 200
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.log.read_text()[-4000:]
            self.note_shared_memory()
            time.sleep(0.2)

    def note_shared_memory(self) -> None:
        """Note the files of /dev/shm that its processes have mapped now: vLLM's queues to workers."""
        for member in self.family():
            with contextlib.suppress(OSError):
                maps = Path(f"/proc/{member.pid}/maps").read_text()
                self.shared_memory |= set(re.findall(r"/dev/shm/(\S+)$", maps, re.MULTILINE))

    def family(self) -> list[psutil.Process]:
        """Every living process of its session, wherever it has been re-parented to."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                ours = os.getsid(process.pid) == self.process.pid
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def engine(self) -> psutil.Process:
        (engine,) = (each for each in self.family() if "EngineCore" in " ".join(each.cmdline()))
        return engine

    def end(self) -> None:
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def lonely(
    checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Lonely]]:
    folder = tmp_path_factory.mktemp("lonely")
    model = checkpoints("mixtral", 8)
    servers = {}
    try:
        for name in ("SIGINT", "SIGTERM", "SIGKILL", "deadline"):
            timeout = 3 if name == "deadline" else 600
            servers[name] = Lonely(model, folder / name, timeout)
        yield servers
    finally:
        for server in servers.values():
            server.end()
    for server in servers.values():
        assert not server.shared_memory, "a rank of one process needs none"


@pytest.mark.parametrize("name", ["deadline", "SIGINT", "SIGTERM", "SIGKILL"])
def test_an_interrupted_start_leaves_nothing(lonely: dict[str, Lonely], name: str) -> None:
    server = lonely[name]
    if name == "deadline":
        server.wait_for_end()
    else:
        server.wait_for("DWDP rank 0 loaded")
        victim = server.process.pid
        if name == "SIGKILL":
            victim = server.engine().pid
        os.kill(victim, getattr(signal, name))
        server.process.wait(timeout=60)
    assert server.process.returncode != 0
    left = psutil.wait_procs(server.family(), timeout=20)[1]
    assert not left, [process.cmdline() for process in left]
    assert not list(server.meet.iterdir()), "a socket is left"
    if name == "deadline":
        log = server.log.read_text()
        assert "ranks [1] of group 0 did not publish their experts within dwdp" in log
        assert "join_timeout_s=3" in log


def test_a_waiting_engine_ends_when_it_is_told_to_and_its_peers_hear_of_it(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """vLLM's engine only notes a signal until it is built, which is when its peers have come."""
    ranks = [
        Lonely(checkpoints("mixtral", 8, num_hidden_layers=3), tmp_path / "both", rank=rank, size=3)
        for rank in (0, 1)
    ]
    try:
        for rank, server in enumerate(ranks):
            server.wait_for(f"DWDP rank {rank} loaded")
        ended = ranks[1].engine()
        ended.terminate()
        ended.wait(timeout=20)
        ranks[0].wait_for_end()
    finally:
        for server in ranks:
            server.end()
    assert "rank 1 of group 0 failed to start: EndedBySignal: SIGTERM while it started" in (
        ranks[0].log.read_text()
    )
    assert not list(ranks[0].meet.iterdir()), "a socket is left"
