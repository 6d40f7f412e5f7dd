"""The digest of a shard, made where its bytes lie: one function, over host memory and over tensors.

It tells ranks whether memory that a survivor kept is still what its owner published. It guards against
corruption and against mix-ups between our own processes, not against an attacker: the keys are public,
and an attacker who knows them can construct two contents with one digest.

A piece of `PIECE_BYTES` is a sequence of words ``w[i]`` of 64 bits, of which ``u[i]`` is the upper half
(arithmetic shift by 32). Each of two lanes sums, modulo 2**64, ``w[i] * K[i] + u[i] * H[i]`` with odd
keys of its own. The digest is the SHA-256 of the number of bytes and of the sums of all pieces in order.

Why two different contents of one size are told apart: some piece differs. With ``l[i]`` for the lower
half a lane sums ``l[i] * K[i] + u[i] * (H[i] + 2**32 * K[i])``: every half has a key of its own, odd and
independent of all others. So the two sums differ by ``d * k`` and terms that do not depend on
``k``, where ``d`` is the difference of one half, ``0 < abs(d) < 2**32``.

- If the piece differs in nothing else (any change within four aligned bytes, hence any flipped bit),
  ``d * k`` cannot be 0 modulo 2**64, because ``k`` is odd: it is found always.
- Otherwise ``d * k`` must hit one value. ``d`` has fewer than 32 factors of 2, so at most 2**31 of the
  2**63 odd keys do: both lanes miss a difference with a probability of at most 2**-64, over keys that
  were drawn after the contents. They are SHAKE-256 of a fixed text, so this holds for contents that do
  not depend on them, as those of checkpoints and of faulty memory do not.

The order of pieces, and the end, are as safe as SHA-256. Over host memory it takes less of a core than
SHA-256 does; on a GPU it is a few passes over the memory, and no byte of a shard travels to the host.
"""

import functools
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import torch

from vllm_dwdp.device.native import sum_pieces

PIECE_BYTES = 64 * 2**10
WORD_BYTES = 8
PIECE_WORDS = PIECE_BYTES // WORD_BYTES
NUM_LANES = 2
THREAD_BYTES = 16 * 2**20
"""What a thread takes at a time."""
BATCH_PIECES = 512
"""What a kernel takes at a time: 32 MiB, beside which it needs two times as much for products."""
KEY_TEXT = b"vllm-dwdp: keys of the digest of a shard"


def digest_host_memory(address: int, num_bytes: int) -> bytes:
    """Return the digest of host memory, by as many threads as this process has cores.

    Args:
        address: of the first byte.
        num_bytes: a multiple of 8.
    """
    assert num_bytes % WORD_BYTES == 0, f"{num_bytes} bytes are not whole words"
    keys = key_bytes()

    def sums_from(start: int) -> bytes:
        num_words = min(THREAD_BYTES, num_bytes - start) // WORD_BYTES
        return sum_pieces(address + start, num_words, keys, PIECE_WORDS)

    starts = range(0, num_bytes, THREAD_BYTES)
    if len(starts) <= 1:
        return _conclude(num_bytes, b"".join(map(sums_from, starts)))
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:
        return _conclude(num_bytes, b"".join(pool.map(sums_from, starts)))


def digest_tensor(words: torch.Tensor) -> bytes:
    """Return the digest of a tensor's bytes, by kernels of its device on torch's current stream.

    Args:
        words: `[num_words]`, int64, contiguous.
    """
    keys = torch.frombuffer(bytearray(key_bytes()), dtype=torch.int64).to(words.device)
    keys = keys.view(NUM_LANES, 2, PIECE_WORDS)
    num_whole, tail_words = divmod(words.numel(), PIECE_WORDS)
    sums = words.new_empty(num_whole + (tail_words > 0), NUM_LANES)
    scratch = words.new_empty(2, min(BATCH_PIECES, len(sums)) * PIECE_WORDS)
    pieces = words[: num_whole * PIECE_WORDS].view(num_whole, PIECE_WORDS)
    for first in range(0, num_whole, BATCH_PIECES):
        batch = slice(first, min(first + BATCH_PIECES, num_whole))
        _sum_batch(pieces[batch], keys, scratch, sums[batch])
    if tail_words:
        tail = words[num_whole * PIECE_WORDS :].view(1, tail_words)
        _sum_batch(tail, keys[..., :tail_words], scratch, sums[num_whole:])
    return _conclude(words.nbytes, sums.cpu().numpy().tobytes())


def digest_content(tensor: torch.Tensor) -> bytes:
    """Return a digest of the elements of any tensor, made on its device, wherever they lie there.

    It is that of the whole words, and of the up to seven bytes behind them.
    """
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    num_bytes = content.numel() // WORD_BYTES * WORD_BYTES
    whole = content[:num_bytes]
    if whole.data_ptr() % WORD_BYTES or whole.storage_offset() % WORD_BYTES:
        whole = whole.clone()
    if whole.device.type == "cpu":
        digest = digest_host_memory(whole.data_ptr(), num_bytes)
    else:
        digest = digest_tensor(whole.view(torch.int64))
    return hashlib.sha256(digest + content[num_bytes:].cpu().numpy().tobytes()).digest()


@functools.cache
def key_bytes() -> bytes:
    """Return the keys `[lane, whole word or upper half, PIECE_WORDS]`, odd, 64 bits, little-endian."""
    drawn = bytearray(hashlib.shake_256(KEY_TEXT).digest(NUM_LANES * 2 * PIECE_BYTES))
    drawn[::WORD_BYTES] = bytes(byte | 1 for byte in drawn[::WORD_BYTES])
    return bytes(drawn)


def _sum_batch(
    pieces: torch.Tensor, keys: torch.Tensor, scratch: torch.Tensor, sums: torch.Tensor
) -> None:
    """Write the sums `[num_pieces, lane]` of `pieces`, `[num_pieces, num_words]`."""
    upper, products = (part[: pieces.numel()].view(pieces.shape) for part in scratch)
    torch.bitwise_right_shift(pieces, 32, out=upper)
    for lane, (word_keys, upper_keys) in enumerate(keys):
        torch.mul(pieces, word_keys, out=products)
        products.addcmul_(upper, upper_keys)
        torch.sum(products, dim=1, out=sums[:, lane])


def _conclude(num_bytes: int, sums: bytes) -> bytes:
    return hashlib.sha256(num_bytes.to_bytes(WORD_BYTES, "little") + sums).digest()
