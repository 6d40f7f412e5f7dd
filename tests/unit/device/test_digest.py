"""The digest of a shard: one function over host memory and over tensors, that tells contents apart."""

import hashlib
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dwdp.device import digest
from vllm_dwdp.device.digest import PIECE_BYTES, PIECE_WORDS, digest_host_memory, digest_tensor

Words = np.ndarray[tuple[int], np.dtype[np.uint64]]
SIZES = (0, 1, 2, 511, PIECE_WORDS, PIECE_WORDS + 1, 3 * PIECE_WORDS + 512)
PAGE_WORDS = 512
NUM_WORDS = 3 * PIECE_WORDS + PAGE_WORDS
TOP, BOTH = 1 << 63, (1 << 63) | (1 << 31)


def words_of(num_words: int, seed: int = 0) -> Words:
    return np.random.default_rng(seed).integers(0, 2**64, num_words, dtype=np.uint64)


CONTENT = words_of(NUM_WORDS)


def of_host(words: Words) -> bytes:
    return digest_host_memory(words.ctypes.data, words.nbytes)


def of_tensor(words: Words) -> bytes:
    return digest_tensor(torch.from_numpy(words.view(np.int64)))


def as_defined(words: Words) -> bytes:
    """Compute the definition with Python's integers, half by half."""
    drawn = np.frombuffer(digest.key_bytes(), np.uint64).tolist()
    lanes = [drawn[lane * 2 * PIECE_WORDS :][: 2 * PIECE_WORDS] for lane in range(2)]
    sums = b""
    for start in range(0, len(words), PIECE_WORDS):
        for keys in lanes:
            total = 0
            for index, word in enumerate(words[start : start + PIECE_WORDS].tolist()):
                signed = word - (word >> 63 << 64)
                lower, upper = signed & 0xFFFFFFFF, signed >> 32
                total += lower * keys[index]
                total += upper * (keys[PIECE_WORDS + index] + (keys[index] << 32))
            sums += (total % 2**64).to_bytes(8, "little")
    return hashlib.sha256(words.nbytes.to_bytes(8, "little") + sums).digest()


@pytest.mark.parametrize("num_words", SIZES)
def test_host_memory_and_tensors_have_the_digest_that_is_defined(
    num_words: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest, "BATCH_PIECES", 2)
    words = words_of(num_words)
    assert of_host(words) == of_tensor(words) == as_defined(words)


def test_what_threads_take_does_not_change_the_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = of_host(CONTENT)
    monkeypatch.setattr(digest, "THREAD_BYTES", PIECE_BYTES)
    assert of_host(CONTENT) == whole


def test_keys_are_odd_and_fixed() -> None:
    """Ranks of one version must agree, and only odd keys always find a change of one half."""
    keys = np.frombuffer(digest.key_bytes(), np.uint64)
    assert len(keys) == 4 * PIECE_WORDS == len(set(keys.tolist()))
    assert (keys & 1).all()
    drawn = hashlib.shake_256(b"vllm-dwdp: keys of the digest of a shard").digest(8)
    assert int(keys[0]) == int.from_bytes(drawn, "little") | 1


@settings(max_examples=200, deadline=None)
@given(st.integers(0, NUM_WORDS * 64 - 1))
def test_any_flipped_bit_changes_it(position: int) -> None:
    changed = CONTENT.copy()
    changed[position // 64] ^= np.uint64(1 << (position % 64))
    assert of_host(changed) != of_host(CONTENT)


@settings(max_examples=100, deadline=None)
@given(st.permutations(range(12)).filter(lambda order: order != sorted(order)), st.booleans())
def test_pages_and_words_in_another_order_change_it(order: list[int], whole_pages: bool) -> None:
    size = PAGE_WORDS if whole_pages else 1
    changed = CONTENT.copy()
    for target, source in enumerate(order):
        changed[target * size : (target + 1) * size] = CONTENT[source * size : (source + 1) * size]
    assert of_host(changed) != of_host(CONTENT)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([1, 2, 8, 4096, PIECE_BYTES, 5 * 4096]))
def test_shifted_content_changes_it(num_bytes: int) -> None:
    shifted = np.roll(CONTENT.view(np.uint8), num_bytes).view(np.uint64)
    assert of_host(shifted) != of_host(CONTENT)


@settings(max_examples=100, deadline=None)
@given(
    st.sets(st.integers(0, NUM_WORDS - 1), min_size=1, max_size=6),
    st.sampled_from([1, 1 << 31, 1 << 32, TOP, BOTH, 2**64 - 1]),
)
def test_the_same_bits_flipped_in_several_words_change_it(places: set[int], bits: int) -> None:
    """Such differences cancel in weaker sums: two top bits always do where keys are odd."""
    changed = CONTENT.copy()
    changed[sorted(places)] ^= np.uint64(bits)
    assert of_host(changed) != of_host(CONTENT)


@pytest.mark.parametrize("bits", [TOP, BOTH])
def test_a_flipped_sign_of_every_number_changes_it(bits: int) -> None:
    assert of_host(CONTENT ^ np.uint64(bits)) != of_host(CONTENT)


@pytest.mark.parametrize("tail", [PAGE_WORDS, PIECE_WORDS])
def test_zeros_at_the_end_change_it(tail: int) -> None:
    """Zeros add nothing to a sum; the number of bytes is part of the digest."""
    longer = np.concatenate([CONTENT, np.zeros(tail, np.uint64)])
    assert of_host(longer) != of_host(CONTENT)
    assert of_host(np.zeros(tail, np.uint64)) != of_host(np.zeros(2 * tail, np.uint64))


def test_each_lane_alone_tells_contents_apart() -> None:
    """Equal lanes would be one lane."""
    keys = np.frombuffer(digest.key_bytes(), np.uint64).reshape(2, 2, PIECE_WORDS)
    assert not (keys[0] == keys[1]).any()


def test_it_takes_less_of_a_core_than_sha_256() -> None:
    """A start digests every byte of a shard; the least of several tries, in seconds of the CPU."""
    content = words_of(2**22)

    def cpu_seconds(function: object) -> float:
        assert callable(function)
        tries = []
        for _ in range(5):
            started = time.process_time()
            function(content)
            tries.append(time.process_time() - started)
        return min(tries)

    of_host(content)
    assert cpu_seconds(of_host) < cpu_seconds(lambda words: hashlib.sha256(words).digest())
