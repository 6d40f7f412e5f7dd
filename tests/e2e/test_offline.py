"""Offline: `from vllm_dwdp import LLM` over two ranks."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import Checkpoints, StockEngine

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(400),
    # vLLM leaves the zmq context of its coordinator client to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SETTINGS = {"enforce_eager": True, "max_num_seqs": 1, "max_model_len": 512, "seed": 0}


def test_generate_chat_order_and_a_rank_that_dies(
    stock: StockEngine, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import SamplingParams

    from tests.e2e.engine_process import PROMPTS
    from vllm_dwdp import LLM
    from vllm_dwdp.compat.worker.cpu import split_cores

    model = checkpoints("qwen3_moe", 8)
    expected = stock(model)
    llm = LLM(model, data_parallel_size=2, **SETTINGS)
    try:
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        prompts = PROMPTS * 5
        outputs = llm.generate(prompts, params)
        assert [output.prompt for output in outputs] == prompts
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        assert tokens == expected["tokens"] * 5

        status = llm.dwdp_status()
        assert [entry["rank"] for entry in status] == [0, 1]
        assert all(entry["steps"]["direct"] > 0 for entry in status), "only one rank worked"

        conversation = [{"role": "user", "content": "hello"}]
        (answer,) = llm.chat(conversation, params, use_tqdm=False)
        assert len(answer.outputs[0].token_ids) == 12

        assert not processes("VLLM::Worker"), "a rank is one process"
        engines = sorted(processes("VLLM::EngineCore"), key=lambda engine: engine.cmdline())
        cores = [sorted(engine.cpu_affinity()) for engine in engines]
        assert cores == [sorted(split_cores(rank, 2)) for rank in (0, 1)]
        victim = engines[0]
        os.kill(victim.pid, signal.SIGKILL)
        with pytest.raises(Exception, match=r"DWDP .*died"):
            llm.generate(prompts, params, use_tqdm=False)
    finally:
        llm.llm_engine.engine_core.shutdown()


def test_worker_processes_on_request(
    stock: StockEngine, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The option `executor`: the same tokens and status, and a dead worker is named alike."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import SamplingParams

    from tests.e2e.engine_process import PROMPTS
    from vllm_dwdp import LLM

    model = checkpoints("qwen3_moe", 8)
    expected = stock(model)
    options = {"dwdp": {"executor": "mp"}}
    llm = LLM(model, data_parallel_size=2, additional_config=options, **SETTINGS)
    try:
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        outputs = llm.generate(PROMPTS, params)
        assert [list(output.outputs[0].token_ids) for output in outputs] == expected["tokens"]
        assert [entry["rank"] for entry in llm.collective_rpc("dwdp_status")] == [0, 1]
        workers = processes("VLLM::Worker")
        assert len(workers) == 2
        workers[0].kill()
        with pytest.raises(Exception, match=r"DWDP .*died"):
            llm.generate(PROMPTS, params, use_tqdm=False)
    finally:
        llm.llm_engine.engine_core.shutdown()


IN_SMALL_SHARED_MEMORY = (
    *("unshare", "--mount", "--propagation", "private", "sh", "-c"),
    'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"',
    "sh",
)
"""As in a container: Docker gives 64 MiB unless it is told otherwise."""

GENERATE = """
import sys
from vllm import SamplingParams
from vllm_dwdp import LLM

if __name__ == "__main__":
    llm = LLM(sys.argv[1], data_parallel_size=2, enforce_eager=True, max_model_len=512)
    (output,) = llm.generate("hello", SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    print("TOKENS", len(output.outputs[0].token_ids))
"""


def test_ranks_start_with_the_shared_memory_of_a_container(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    if subprocess.run([*IN_SMALL_SHARED_MEMORY, "true"], check=False).returncode != 0:
        pytest.skip("mounting takes root")
    script = tmp_path / "generate.py"
    script.write_text(GENERATE)
    command = [*IN_SMALL_SHARED_MEMORY, sys.executable, str(script), checkpoints("mixtral", 8)]
    ended = subprocess.run(
        command,
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert "TOKENS 4" in ended.stdout, ended.stdout[-4000:]


def processes(name: str) -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [child for child in children if name in " ".join(child.cmdline())]
