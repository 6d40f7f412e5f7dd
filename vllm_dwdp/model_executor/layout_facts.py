"""What the layers of all ranks must have in common, as it travels between ranks, and how it differs.

By layer and path: kernels, the layout of per-expert tensors, the content of replicated ones. Compressed,
because the layers of a model are mostly alike and a message between ranks is small.
"""

import zlib

import msgspec

LayoutFacts = dict[str, dict[str, str]]
"""Facts by layer name, then by path within the layer."""

MAX_BYTES = 32 * 2**20
"""A peer's facts are data: more than this is not unpacked."""

_decoder = msgspec.msgpack.Decoder(LayoutFacts)


def encode_facts(facts: LayoutFacts) -> bytes:
    """Return the bytes of some facts; equal facts in the same order have equal bytes."""
    return zlib.compress(msgspec.msgpack.encode(facts), 9)


def decode_facts(data: bytes) -> LayoutFacts:
    """Return the facts in `data`; none if it holds none."""
    try:
        unpacked = zlib.decompressobj().decompress(data, MAX_BYTES)
        return _decoder.decode(unpacked)
    except (zlib.error, msgspec.DecodeError):
        return {}


def first_difference(ours: bytes, theirs: bytes) -> str:
    """Name the first fact that differs, and both values."""
    mine, other = decode_facts(ours), decode_facts(theirs)
    for layer in dict.fromkeys([*mine, *other]):
        here, there = mine.get(layer, {}), other.get(layer, {})
        for path in dict.fromkeys([*here, *there]):
            if here.get(path) != there.get(path):
                return (
                    f"{layer}, {path}: {here.get(path, 'absent')} here, "
                    f"{there.get(path, 'absent')} there"
                )
    return "an unreadable description"
