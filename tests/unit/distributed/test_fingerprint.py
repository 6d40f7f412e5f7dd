"""What makes two checkpoints the same."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vllm_dwdp.distributed import fingerprint
from vllm_dwdp.distributed.fingerprint import checkpoint_digest, describe


def test_every_byte_of_a_small_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    digests = set()
    for position in (None, 0, 100_000, 299_999):
        content = bytearray(300_000)
        if position is not None:
            content[position] = 1
        path.write_bytes(content)
        digests.add(checkpoint_digest([path]))
    assert len(digests) == 4


def test_large_files_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(fingerprint, "SAMPLE_BYTES", 10)
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(16_000))
    before = checkpoint_digest([path])
    changed = bytearray(16_000)
    changed[1005] = 1
    path.write_bytes(changed)
    assert checkpoint_digest([path]) != before
    path.write_bytes(bytes(16_001))
    assert checkpoint_digest([path]) != before


def test_names_and_order_of_listing(tmp_path: Path) -> None:
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path in paths:
        path.write_bytes(b"x")
    assert checkpoint_digest(paths) == checkpoint_digest(paths[::-1])
    assert checkpoint_digest(paths) != checkpoint_digest(paths[:1])


def test_of_a_large_checkpoint_every_byte_counts_that_more_than_one_rank_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(fingerprint, "SAMPLE_BYTES", 16)
    monkeypatch.setattr(fingerprint, "PIECE_BYTES", 4096)
    path = tmp_path / "model.safetensors"
    names = ("layers.0.attn.weight", "layers.0.mlp.experts.3.w1", "layers.0.mlp.shared_experts.w1")
    save_file({name: torch.zeros(20_000, dtype=torch.uint8) for name in names}, path)
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little")
    places = json.loads(content[8 : 8 + header])
    before = checkpoint_digest([path])
    for name in names:
        changed = bytearray(content)
        start, stop = places[name]["data_offsets"]
        step = len(content) // 16
        between = next(
            byte for byte in range(start + 1, stop - 1) if (8 + header + byte) % step > 16
        )
        changed[8 + header + between] = 1
        path.write_bytes(changed)
        is_expert = ".experts." in name
        assert (checkpoint_digest([path]) == before) == is_expert, name


def test_a_large_file_that_is_no_checkpoint_is_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 100)
    path = tmp_path / "model.safetensors"
    for content in (b"\xff" * 5000, (4000).to_bytes(8, "little") + b"{" * 5000, bytes(5000)):
        path.write_bytes(content)
        assert len(checkpoint_digest([path])) == 64


def test_of_digests_a_line_shows_what_tells_them_apart() -> None:
    """The end of the sentence says what to do, and `launch` shows its beginning."""
    differences: dict[str, tuple[object, object]] = {
        "checkpoint_digest": ("a" * 64, "update " + "b" * 64),
        "group_size": (2, 3),
    }
    assert describe(differences) == (
        f"checkpoint_digest is {'a' * 19!r} here and {'update ' + 'b' * 12!r} there; "
        "group_size is 2 here and 3 there"
    )
