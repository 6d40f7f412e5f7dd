"""What NIXL's side channel says of a server's blocks of the KV cache."""

import threading
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.compat


def nixl_answer(engine_id: str, **changes: Any) -> bytes:
    """Return what vLLM's connector answers at its side channel."""
    import msgspec
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import (
        NixlAgentMetadata,
        NixlHandshakePayload,
    )

    says: dict[str, Any] = {
        "engine_id": engine_id,
        "agent_metadata": b"",
        "kv_caches_base_addr": [1],
        "device_id": 0,
        "num_blocks": 4,
        "block_lens": [32, 64],
        "block_strides": [32, 64],
        "kv_cache_layout": "LBNHC",
        "block_size": 16,
        "ssm_sizes": (0, 0),
        "attn_backend_name": "CPU_ATTN",
        "physical_blocks_per_logical_kv_block": 1,
    }
    blocks = msgspec.msgpack.encode(NixlAgentMetadata(**says | changes))
    payload = NixlHandshakePayload(compatibility_hash="hash", agent_metadata_bytes=blocks)
    return bytes(msgspec.msgpack.encode(payload))


def test_vllm_tells_us_of_its_kv_blocks_as_it_tells_decode_servers() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_scheduler import (
        NixlBaseConnectorScheduler,
    )

    from vllm_dwdp.compat.frontend.nixl import Handshake, read_handshake
    from vllm_dwdp.entrypoints.launch.ports import free_ports

    (port,) = free_ports(1)
    ready, stop = threading.Event(), threading.Event()
    listener = threading.Thread(
        target=NixlBaseConnectorScheduler._nixl_handshake_listener,
        args=({(0, 0): nixl_answer("e")}, ready, stop, "127.0.0.1", port),
        daemon=True,
    )
    listener.start()
    assert ready.wait(10)
    try:
        assert read_handshake("127.0.0.1", port) == Handshake(
            settings_hash="hash",
            engine_id="e",
            backend="CPU_ATTN",
            layout="LBNHC",
            block_bytes=(32, 64),
        )
    finally:
        stop.set()
        listener.join(10)


def test_nobody_answers_at_a_side_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_dwdp.compat.frontend import nixl
    from vllm_dwdp.entrypoints.launch.ports import free_ports

    monkeypatch.setattr(nixl, "ANSWER_TIMEOUT_S", 0.1)
    assert nixl.read_handshake("127.0.0.1", *free_ports(1)) is None


@pytest.mark.parametrize(
    ("given", "differs"),
    [
        ({"dtype": "float16"}, {"--dtype": ("bfloat16", "float16")}),
        (
            {"disable_hybrid_kv_cache_manager": True},
            {"--disable-hybrid-kv-cache-manager": ("False", "True")},
        ),
        ({"kv_cache_dtype": "fp8"}, {}),
    ],
)
def test_what_makes_two_nixl_hashes_differ_is_found(
    tmp_path: Path, given: dict[str, Any], differs: dict[str, Any]
) -> None:
    from vllm import EngineArgs
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import (
        compute_nixl_compatibility_hash,
    )

    from gpu_checks.checkpoints import make_checkpoint
    from vllm_dwdp.compat.frontend.nixl import Question, find_differences

    model = str(make_checkpoint(tmp_path / "model", "qwen3_moe", 4))

    def settings_hash(**options: Any) -> str:
        config = EngineArgs(model=model, max_model_len=512, **options).create_engine_config()
        return str(compute_nixl_compatibility_hash(config, "CPU_ATTN", transfer_mode="pull"))

    question = Question(
        arguments=(model, "--max-model-len", "512", "--served-model-name", "m", "--api-key", "k"),
        cache_dtype="auto",
        backend="CPU_ATTN",
        transfer_mode="pull",
        hashes=(settings_hash(), settings_hash(**given)),
    )
    assert find_differences(question) == differs
