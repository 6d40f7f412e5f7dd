"""Who may share experts with whom: everything that must be equal on every rank of a group."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import msgspec

SAMPLE_BYTES = 64 * 1024
SAMPLES_PER_FILE = 16
WHOLE_BYTES = 64 * 2**20


class Fingerprint(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about the model and its layout; equal on all ranks of a group, or they must not meet."""

    model: str
    revision: str
    checkpoint_digest: str
    config_digest: str
    dtype: str
    quantization: str
    group_size: int
    experts_per_rank: int
    page_bytes: int
    vllm_version: str
    plugin_version: str

    def differences(self, other: "Fingerprint") -> dict[str, tuple[object, object]]:
        """Fields that differ, as (ours, theirs). The path of the model may differ."""
        return {
            name: (getattr(self, name), getattr(other, name))
            for name in self.__struct_fields__
            if name != "model" and getattr(self, name) != getattr(other, name)
        }


def describe(differences: dict[str, tuple[object, object]]) -> str:
    """One line naming each differing field with both values."""
    return "; ".join(
        f"{name} is {ours!r} here and {theirs!r} there"
        for name, (ours, theirs) in differences.items()
    )


def checkpoint_digest(files: Iterable[Path]) -> str:
    """Identity of checkpoint content: names, sizes, and the bytes of every file.

    Files of up to `WHOLE_BYTES` are read whole; of larger ones, which a rank reads only its share
    of, 16 samples at positions that depend on nothing but the size. A single byte that differs
    between the samples of a large file is not seen.
    """
    digest = hashlib.sha256()
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        step = SAMPLE_BYTES if size <= WHOLE_BYTES else size // SAMPLES_PER_FILE
        with path.open("rb") as file:
            for position in range(0, size, step):
                file.seek(position)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
