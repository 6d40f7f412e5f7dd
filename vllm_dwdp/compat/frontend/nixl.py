"""What servers tell each other of their KV blocks before one fetches them: vLLM's NIXL handshake.

A server answers at its side channel with a hash of its settings and a description of its blocks. The
hash cannot be read backwards. Of the settings that nothing else shows there are few values, so that
every combination can be tried until the hash of a server comes out.

Reading needs no vLLM; naming what makes two hashes differ does, and runs in a process of its own:

    python -m vllm_dwdp.compat.frontend.nixl QUESTION
"""

import copy
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import msgspec

GET_METADATA = b"get_meta_msg"
ANSWER_TIMEOUT_S = 3.0
NAMING_TIMEOUT_S = 120.0
DTYPES = ("bfloat16", "float16", "float32")
"""Of models that vLLM serves."""


@dataclass(frozen=True, kw_only=True)
class Handshake:
    """What a server answers at its side channel.

    Args:
        settings_hash: of what must agree.
        engine_id: of the engine whose blocks they are; another one after a restart.
        backend: vLLM's name of its attention backend.
        layout: of its KV blocks.
        block_bytes: of a block in each region that it registered.
    """

    settings_hash: str
    engine_id: str
    backend: str
    layout: str
    block_bytes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Question:
    """Two servers whose hashes differ.

    Args:
        arguments: of the `vllm serve` of one of them, its model first.
        cache_dtype: of the KV cache of both.
        backend: the attention backend of both.
        transfer_mode: of both, as the connector names it.
        hashes: of the one that the arguments are of, and of the other one.
    """

    arguments: Sequence[str]
    cache_dtype: str
    backend: str
    transfer_mode: str
    hashes: tuple[str, str]


def read_handshake(host: str, port: int) -> Handshake | None:
    """Ask a side channel; None where no server answers in time, or one of another version.

    Args:
        host: of the side channel.
        port: of it.
    """
    import zmq

    context = zmq.Context()
    try:
        with context.socket(zmq.REQ) as channel:
            channel.setsockopt(zmq.LINGER, 0)
            channel.setsockopt(zmq.RCVTIMEO, int(1000 * ANSWER_TIMEOUT_S))
            channel.connect(f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}")
            channel.send(msgspec.msgpack.encode((GET_METADATA, 0, 0)))
            return _handshake(channel.recv_multipart()[0])
    except (zmq.ZMQError, msgspec.DecodeError, KeyError):
        return None
    finally:
        context.term()


def _handshake(answer: bytes) -> Handshake:
    payload = msgspec.msgpack.decode(answer)
    blocks = msgspec.msgpack.decode(payload["agent_metadata_bytes"])
    return Handshake(
        settings_hash=payload["compatibility_hash"],
        engine_id=blocks["engine_id"],
        backend=blocks["attn_backend_name"],
        layout=blocks["kv_cache_layout"],
        block_bytes=tuple(blocks["block_lens"]),
    )


def name_differences(question: Question) -> dict[str, tuple[str, str]]:
    """Return the settings that make two hashes differ, with both values; empty if none of ours does.

    Runs a process that imports vLLM.
    """
    command = [sys.executable, "-m", __name__, json.dumps(asdict(question))]
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=NAMING_TIMEOUT_S
        )
        found = json.loads(ended.stdout.strip().splitlines()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError):
        return {}
    return {name: (ours, theirs) for name, (ours, theirs) in found.items()}


def find_differences(question: Question) -> dict[str, tuple[str, str]]:
    """Try the values of what a hash hides until both hashes come out; imports vLLM."""
    from vllm import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    model, *rest = question.arguments
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    known, _ = parser.parse_known_args(["--model", model, *rest])
    config = AsyncEngineArgs.from_cli_args(known).create_model_config()
    hidden = [
        {"--dtype": dtype, "--disable-hybrid-kv-cache-manager": disabled}
        for dtype, disabled in itertools.product(DTYPES, (False, True))
    ]
    by_hash = {_hash(config, question, each): each for each in hidden}
    ours, theirs = (by_hash.get(each, {}) for each in question.hashes)
    return {
        name: (str(ours[name]), str(theirs[name]))
        for name in ours.keys() & theirs.keys()
        if ours[name] != theirs[name]
    }


def _hash(model_config: Any, question: Question, hidden: dict[str, Any]) -> str:
    import torch
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import (
        compute_nixl_compatibility_hash,
    )

    model = copy.copy(model_config)
    model.dtype = getattr(torch, hidden["--dtype"])
    disabled = hidden["--disable-hybrid-kv-cache-manager"]
    vllm_config = SimpleNamespace(
        model_config=model,
        cache_config=SimpleNamespace(cache_dtype=question.cache_dtype),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=disabled),
        speculative_config=None,
    )
    return str(
        compute_nixl_compatibility_hash(
            vllm_config, question.backend, transfer_mode=question.transfer_mode
        )
    )


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(json.dumps(find_differences(Question(**asked | {"hashes": tuple(asked["hashes"])}))))
