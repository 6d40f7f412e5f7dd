"""What has come of new weights, in a few bytes: by it ranks tell whether they were given the same.

Every byte counts, also of experts that this rank does not keep. Weights of a trainer are in memory when
they come, so that nothing is read for it.
"""

import hashlib

import torch

from vllm_dwdp.device.digest import digest_content
from vllm_dwdp.distributed.fingerprint import SENT


class Arrivals:
    """Digests of the tensors of an update, by name.

    Args:
        before: identity of the weights that the update changes; empty if only names are wanted.
    """

    def __init__(self, before: str) -> None:
        self.digests: dict[str, bytes] = {}
        self._before = before

    @property
    def last(self) -> str:
        """Name of the tensor that came last; empty if none has."""
        return next(reversed(self.digests), "")

    def note(self, name: str, tensor: torch.Tensor) -> None:
        """Note a tensor that came: its name, type, shape and bytes."""
        if not self._before:
            self.digests[name] = b""
            return
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(digest_content(tensor))
        self.digests[name] = digest.digest()

    def identity(self) -> str:
        """Return the identity of the weights after the update."""
        digest = hashlib.sha256(self._before.encode())
        for name, each in sorted(self.digests.items()):
            digest.update(name.encode() + each)
        return f"{SENT}{digest.hexdigest()}"
