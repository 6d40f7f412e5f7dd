"""The commands of the Compose files, each service in namespaces of its own."""

import importlib.util
import json
import os
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.conftest import Checkpoints, StockEngine
from tests.e2e.engine_process import PROMPTS
from tests.helpers.compose import Project
from tests.helpers.containers import SHM_BYTES, why_not
from tests.helpers.waiting import wait_until

DEPLOY = Path(__file__).parents[2] / "examples" / "deploy"
START_S = 250.0
RANKS = ("rank0", "rank1")

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


class Deployment:
    """A running Compose file and its client."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.client = project.network.threads()

    def get(self, service: str, path: str, body: dict[str, Any] | None = None) -> str:
        """Return the answer of a service to a client that is on the containers' network."""
        data = None if body is None else json.dumps(body).encode()
        url = self.project.url(service) + path
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})

        def ask() -> str:
            with urllib.request.urlopen(request, timeout=120) as response:
                return str(response.read().decode())

        return self.client.submit(ask).result()

    def tokens(self, prompt: str, service: str = "router") -> list[int]:
        body = {"model": "m", "prompt": prompt, "temperature": 0, "max_tokens": 12}
        body |= {"ignore_eos": True, "return_token_ids": True}
        return list(
            json.loads(self.get(service, "/v1/completions", body))["choices"][0]["token_ids"]
        )

    def metric(self, service: str, name: str) -> float:
        families = text_string_to_metric_families(self.get(service, "/metrics"))
        return sum(s.value for family in families for s in family.samples if s.name == name)

    def wait_for_metric(self, service: str, name: str) -> None:
        """Return once it is above 0: ranks are asked for their figures every few seconds."""
        wait_until(lambda: self.metric(service, name) > 0)

    def answers(self) -> bool:
        try:
            return bool(self.tokens("are you there"))
        except OSError:
            return False


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """For containers whose user is not ours."""
    if reason := why_not():
        pytest.skip(f"containers cannot be made here: {reason}")
    return tmp_path


def environment(model: str, folder: Path) -> dict[str, str]:
    """Of the shell that would call `docker compose up`."""
    models = folder / "models"
    shutil.copytree(model, models / "model")
    for path in models.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    arguments = "--enforce-eager --max-model-len 512 --max-num-seqs 1 --max-num-batched-tokens 64"
    return {
        "IMAGE": "none",
        "MODELS": str(models),
        "MODEL": "/models/model",
        "MODE": "prefetch",
        "ARGUMENTS": f"{arguments} --served-model-name m",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }


def test_two_ranks_and_a_router(checkpoints: Checkpoints, stock: StockEngine, folder: Path) -> None:
    """Answers of stock, experts read across containers, and a killed container that adopts its own."""
    model = checkpoints("qwen3_moe", 8)
    expected = stock(model)["tokens"]
    with Project(DEPLOY / "compose.yaml", environment(model, folder), folder) as project:
        deployment = Deployment(project)
        project.wait_until_healthy(*RANKS, "router", timeout_s=START_S)
        for _ in RANKS:
            assert [deployment.tokens(prompt) for prompt in PROMPTS] == expected
        for rank in RANKS:
            for name in ("vllm:dwdp_fetched_bytes_total", "vllm:dwdp_read_expert_bytes"):
                deployment.wait_for_metric(rank, name)
            assert deployment.metric(rank, "vllm:request_success_total") > 0
            assert shm_bytes(project, rank) == SHM_BYTES

        killed_at = time.monotonic()
        project.containers["rank1"].kill()
        wait_until(lambda: project.num_starts["rank1"] == 2)
        wait_until(deployment.answers)
        assert [deployment.tokens(prompt) for prompt in PROMPTS] == expected
        project.wait_until_healthy("rank1", timeout_s=START_S)
        print(f"back after {time.monotonic() - killed_at:.1f} s")
        assert [deployment.tokens(prompt, "rank1") for prompt in PROMPTS] == expected
        for name in ("vllm:dwdp_rejoin_seconds", "vllm:dwdp_fetched_bytes_total"):
            deployment.wait_for_metric("rank1", name)
        assert deployment.metric("rank1", "vllm:dwdp_read_expert_bytes") == 0, "it adopted nothing"
        assert project.num_starts == {"rank0": 1, "rank1": 2, "router": 1}


def shm_bytes(project: Project, service: str) -> int:
    first = project.containers[service].first_process
    assert first is not None
    found = os.statvfs(f"/proc/{first.pid}/root/dev/shm")
    return found.f_blocks * found.f_frsize


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="NIXL is not installed")
def test_ranks_that_compute_prompts_and_a_decode_server(
    checkpoints: Checkpoints, stock: StockEngine, folder: Path
) -> None:
    """Experts reach ranks and KV blocks the decode server; a killed rank costs no request.

    A decode server that comes back is compared with the ranks before it gets requests.
    """
    model = checkpoints("qwen3_moe", 8)
    expected = stock(model)["tokens"]
    received = "vllm:nixl_bytes_transferred_sum"
    file = DEPLOY / "compose.disaggregated.yaml"
    with Project(file, environment(model, folder), folder) as project:
        deployment = Deployment(project)
        everything = (*RANKS, "decode0", "relay", "router")
        project.wait_until_healthy(*everything, timeout_s=START_S)
        for _ in RANKS:
            assert [deployment.tokens(prompt) for prompt in PROMPTS] == expected
        deployment.wait_for_metric("decode0", received)
        for rank in RANKS:
            deployment.wait_for_metric(rank, "vllm:dwdp_fetched_bytes_total")
        assert deployment.metric("decode0", "vllm:nixl_num_failed_transfers_total") == 0

        project.containers["rank1"].kill()
        for _ in RANKS:
            assert [deployment.tokens(prompt) for prompt in PROMPTS] == expected
        project.wait_until_healthy("rank1", timeout_s=START_S)
        deployment.wait_for_metric("rank1", "vllm:dwdp_rejoin_seconds")
        before = deployment.metric("rank1", "vllm:request_success_total")
        for _ in RANKS:
            assert [deployment.tokens(f"back {prompt}") for prompt in PROMPTS]
        wait_until(lambda: deployment.metric("rank1", "vllm:request_success_total") > before)

        for arguments, says in (("--block-size=64", "gets no requests"), ("", "fits the ranks")):
            known = len(project.log("relay").read_text())
            project.services["decode0"]["environment"]["DECODE_ARGUMENTS"] = arguments
            project.containers["decode0"].kill()
            wait_until(
                lambda: says in project.log("relay").read_text()[known:],  # noqa: B023
                timeout_s=START_S,
            )
            if arguments:
                with pytest.raises(urllib.error.HTTPError) as refused:
                    deployment.tokens("for nobody")
                assert refused.value.code == 503
                assert "--block-size is '64' there" in refused.value.read().decode()
        assert [deployment.tokens(prompt) for prompt in PROMPTS] == expected
        deployment.wait_for_metric("decode0", received)
        started = dict.fromkeys(everything, 1) | {"rank1": 2, "decode0": 3}
        assert project.num_starts == started
