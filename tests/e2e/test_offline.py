"""Offline: `from vllm_dwdp import LLM` over two ranks."""

import os
import signal

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

        victim = worker_processes()[0]
        os.kill(victim.pid, signal.SIGKILL)
        with pytest.raises(Exception, match=r"DWDP .*died"):
            llm.generate(prompts, params, use_tqdm=False)
    finally:
        llm.llm_engine.engine_core.shutdown()


def worker_processes() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "Worker" in " ".join(child.cmdline())]
