"""A client that is not vLLM's: guidellm, of ranks that copy each other's experts, behind the router."""

import json
import subprocess
import sysconfig
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Checkpoints
from tests.helpers.environments import Unavailable, environment
from vllm_dwdp.entrypoints.bench.deployments import Setting
from vllm_dwdp.entrypoints.bench.starting import start

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

VERSION = "0.8.1"
NUM_REQUESTS, OUTPUT_TOKENS = 12, 8


@pytest.fixture(scope="module")
def guidellm(request: pytest.FixtureRequest) -> list[str]:
    """Return the command of guidellm."""
    python_version = sysconfig.get_python_version()
    folder = request.config.cache.mkdir(f"guidellm-{VERSION}-python-{python_version}")
    try:
        return [str(environment(Path(folder), f"guidellm=={VERSION}")), "-m", "guidellm"]
    except Unavailable as reason:
        pytest.skip(str(reason))


def measure(guidellm: list[str], url: str, model: str, folder: Path) -> dict[str, Any]:
    """Run it once, and return its report."""
    report = folder / "report.json"
    data = f"kind=synthetic_text,prompt_tokens=16,output_tokens={OUTPUT_TOKENS}"
    command = [
        *(*guidellm, "run", "--backend", f"kind=openai_http,target={url},model=m"),
        *("--tokenizer", f"kind=hf_auto,model={model}", "--data", data),
        *("--profile", "kind=concurrent,streams=[2]"),
        *("--constraint", f"kind=max_requests,count={NUM_REQUESTS}"),
        *("--output", f"kind=json,path={report}", "--disable-console"),
    ]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=200, check=False, cwd=folder
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    content: dict[str, Any] = json.loads(report.read_text())
    return content


def test_another_client_measures_the_ranks(
    guidellm: list[str],
    checkpoints: Checkpoints,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = checkpoints("qwen3_moe", 7)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = ("--enforce-eager", "--max-model-len", "512")
    setting = Setting(model=model, num_ranks=2, arguments=arguments, folder=tmp_path, one_url=True)
    with ExitStack() as stack:
        deployment = start(stack, "prefetch", setting, print)
        with deployment.running():
            report = measure(guidellm, deployment.url(), model, tmp_path)
            fetched = [
                server.metric("vllm:dwdp_fetched_bytes_total") for server in deployment.servers
            ]
            answered = [
                server.metric("vllm:request_success_total") for server in deployment.servers
            ]
    assert fetched[0] and fetched[1], "DWDP did not run"
    assert answered[0] and answered[1] and sum(filter(None, answered)) == NUM_REQUESTS
    (benchmark,) = report["benchmarks"]
    counts = benchmark["metrics"]["request_totals"]
    assert (counts["successful"], counts["errored"]) == (NUM_REQUESTS, 0)
    answers = benchmark["requests"]["successful"]
    assert [answer["output_tokens"] for answer in answers] == [OUTPUT_TOKENS] * NUM_REQUESTS
    assert all(answer["time_to_first_token_ms"] > 0 for answer in answers)
