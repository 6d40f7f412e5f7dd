"""What has come of new weights, in a few bytes: by it ranks tell whether they were given the same."""

import hashlib

import torch

SAMPLE_BYTES = 4096
"""Of a routed expert; every byte of another tensor counts."""


class Arrivals:
    """Digests of the tensors of an update, by name.

    Args:
        before: identity of the weights that the update changes; empty if only names are wanted.
    """

    def __init__(self, before: str) -> None:
        self.digests: dict[str, bytes] = {}
        self._before = before

    def note(self, name: str, tensor: torch.Tensor) -> None:
        """Note a tensor that came; of a routed expert, another rank's or ours, its beginning counts."""
        if not self._before:
            self.digests[name] = b""
            return
        content = tensor.detach().reshape(-1).view(torch.uint8)
        if ".experts." in name:
            content = content[:SAMPLE_BYTES]
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(content.cpu().contiguous().numpy())
        self.digests[name] = digest.digest()

    def identity(self) -> str:
        """Of the weights after the update."""
        digest = hashlib.sha256(self._before.encode())
        for name, each in sorted(self.digests.items()):
            digest.update(name.encode() + each)
        return f"update {digest.hexdigest()}"
