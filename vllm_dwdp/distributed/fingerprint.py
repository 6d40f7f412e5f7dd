"""Who may share experts with whom: everything that must be equal on every rank of a group."""

import hashlib
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

SAMPLE_BYTES = 64 * 1024
SAMPLES_PER_FILE = 16
WHOLE_BYTES = 16 * 2**30
"""Of a whole checkpoint: some ten seconds of a core, and no more reading than the group does anyway."""
DIGEST_CHARACTERS = 19
"""So much of a digest is shown, with the word before it that says what was digested."""
PIECE_BYTES = 16 * 2**20
UNKNOWN = "unknown"
"""The digest of what cannot be compared."""
SENT = "update "
"""How a digest begins of weights that came from a trainer, and are no checkpoint."""
MAX_HEADER_BYTES = 100 * 10**6  # as the safetensors format has it


class _Tensor(msgspec.Struct):
    """An entry of a safetensors header; its metadata has no offsets."""

    data_offsets: tuple[int, int] | None = None


_headers = msgspec.json.Decoder(dict[str, _Tensor])


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
    tensor_slice: str
    page_bytes: int
    vllm_version: str
    plugin_version: str

    @property
    def checkpoint(self) -> str | None:
        """Where the weights were read from, as a name that other processes of the host can use.

        None of weights that a trainer has sent.
        """
        return None if self.checkpoint_digest.startswith(SENT) else self.model

    def differences(self, other: "Fingerprint") -> dict[str, tuple[object, object]]:
        """Fields that differ, as (ours, theirs).

        Where equal content came from may differ: its path or name, and the name of its revision.
        """
        fields = [name for name in self.__struct_fields__ if name != "model"]
        if self.checkpoint_digest == other.checkpoint_digest != UNKNOWN:
            fields.remove("revision")
        return {
            name: (getattr(self, name), getattr(other, name))
            for name in fields
            if getattr(self, name) != getattr(other, name)
        }


def describe(differences: dict[str, tuple[object, object]]) -> str:
    """One line naming each differing field with both values; of digests, what tells them apart."""
    return "; ".join(
        f"{name} is {_shown(name, ours)} here and {_shown(name, theirs)} there"
        for name, (ours, theirs) in differences.items()
    )


def advice(served: Fingerprint, update: int, differences: Mapping[str, object]) -> str:
    """Say to a rank that was refused how it can join.

    Args:
        served: by the group.
        update: number of the last update of the group's weights; 0 as they were loaded at first.
        differences: of what the rank would serve.
    """
    if not update or "checkpoint_digest" not in differences:
        return "Start every rank with the same checkpoint, arguments and versions"
    updated = f"The weights of this group have been updated since it started (update {update})"
    if served.checkpoint is None:
        return f"{updated} by a trainer: restart all ranks of the group and send them again"
    return (
        f"{updated}, from {served.checkpoint}: make that checkpoint readable there for the rank that "
        "starts, with that digest, or start it with a copy"
    )


def _shown(name: str, value: object) -> str:
    """Return a value for a line of which terminals see the beginning only."""
    return repr(str(value)[:DIGEST_CHARACTERS] if name.endswith("_digest") else value)


def checkpoint_digest(files: Iterable[Path]) -> str:
    """Identity of checkpoint content: names, sizes, and every byte that more than one rank reads.

    Up to `WHOLE_BYTES` in all, every byte counts. Of the files of a larger checkpoint the header and all
    tensors but the routed experts do; of the experts, of which a rank reads only its share, 16 samples
    at positions that depend on nothing but the size. A byte of an expert that differs between samples
    is not seen.
    """
    paths = sorted(files)
    whole = sum(path.stat().st_size for path in paths) <= WHOLE_BYTES
    pieces = [(path, *span) for path in paths for span in (_whole if whole else _spans_read)(path)]
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}:{path.stat().st_size}".encode())
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:
        for piece in pool.map(_digest_of, pieces):
            digest.update(piece)
    return digest.hexdigest()


def _digest_of(piece: tuple[Path, int, int]) -> bytes:
    """Map the file instead of reading it: buffers would leave holes in the heap of the coming model."""
    path, start, stop = piece
    first_page = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with (
        path.open("rb") as file,
        mmap.mmap(
            file.fileno(), stop - first_page, access=mmap.ACCESS_READ, offset=first_page
        ) as mapped,
        memoryview(mapped) as pages,
        pages[start - first_page :] as content,
    ):
        return hashlib.sha256(content).digest()


def _whole(path: Path) -> Iterator[tuple[int, int]]:
    """All of a file, in pieces of at most `PIECE_BYTES`."""
    yield from _cut(0, path.stat().st_size)


def _spans_read(path: Path) -> Iterator[tuple[int, int]]:
    """Yield the byte ranges that count of a file of a large checkpoint, at most `PIECE_BYTES` each."""
    size = path.stat().st_size
    for start, stop in _shared_spans(path):
        yield from _cut(start, min(stop, size))
    for start in range(0, size, max(1, size // SAMPLES_PER_FILE)):
        yield start, min(start + SAMPLE_BYTES, size)


def _shared_spans(path: Path) -> Iterator[tuple[int, int]]:
    """Yield the header of a safetensors file and its tensors that are no routed experts.

    Nothing of a file that is no such file: vLLM's loader says what is wrong with it.
    """
    header = _header(path)
    if header is None:
        return
    data, tensors = header
    yield 0, data
    for name, tensor in sorted(tensors.items()):
        if ".experts." not in name and tensor.data_offsets is not None:
            start, stop = tensor.data_offsets
            yield data + start, data + stop


def declared_bytes(path: Path) -> int | None:
    """Return how long a safetensors file is by its own header; None if it has none."""
    header = _header(path)
    if header is None:
        return None
    data, tensors = header
    return data + max(
        (each.data_offsets[1] for each in tensors.values() if each.data_offsets), default=0
    )


def _header(path: Path) -> tuple[int, dict[str, _Tensor]] | None:
    """Return where the data of a safetensors file begins, and its tensors; None if it is none."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= MAX_HEADER_BYTES:
            return None
        text = file.read(length)
    try:
        return 8 + length, _headers.decode(text)
    except msgspec.DecodeError:
        return None


def _cut(start: int, stop: int) -> Iterator[tuple[int, int]]:
    for begin in range(start, stop, PIECE_BYTES):
        yield begin, min(begin + PIECE_BYTES, stop)
