"""The digest of a shard, wherever its bytes lie. Pure: imports neither vLLM nor torch."""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

PIECE_BYTES = 16 * 2**20


def digest_pieces(read: Callable[[int, int], Any], num_bytes: int) -> bytes:
    """SHA-256 over the SHA-256 of each piece of `PIECE_BYTES`, by as many threads as there are cores.

    Args:
        read: a buffer of the bytes from an offset on, of a length; called by several threads.
        num_bytes: of the whole.
    """

    def digest_piece(start: int) -> bytes:
        return hashlib.sha256(read(start, min(PIECE_BYTES, num_bytes - start))).digest()

    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:
        pieces = pool.map(digest_piece, range(0, num_bytes, PIECE_BYTES))
        return hashlib.sha256(b"".join(pieces)).digest()
