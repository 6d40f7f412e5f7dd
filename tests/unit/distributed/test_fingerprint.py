"""What makes two checkpoints the same."""

from pathlib import Path

import pytest

from vllm_dwdp.distributed import fingerprint
from vllm_dwdp.distributed.fingerprint import checkpoint_digest


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
