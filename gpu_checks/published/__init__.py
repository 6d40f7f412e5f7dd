"""Small checkpoints of families whose code is published with their weights: transformers has none.

Their tensors are listed here, by the names that published checkpoints have; vLLM refuses a name that it
does not know, and a parameter that it is not given. Where transformers and vLLM do not know the
configuration either, the checkpoint brings its own, as published ones do.
"""

from gpu_checks.published.families import TEXT
from gpu_checks.published.multimodal import MULTIMODAL
from gpu_checks.published.newer import NEWER
from gpu_checks.published.writing import TABLE, Published, add_tokens, write_published

__all__ = ["PUBLISHED", "TABLE", "Published", "add_tokens", "write_published"]

PUBLISHED: dict[str, Published] = TEXT | MULTIMODAL | NEWER
"""By name; what `gpu_checks.checkpoints` writes beside what transformers builds."""
