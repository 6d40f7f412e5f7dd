"""The names of a model's modules, as the lists in its quantisation config mean them. Pure."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate
from functools import cached_property

from vllm_dwdp.errors import DwdpConfigError
from vllm_dwdp.planner.checked import shown

KINDS: Mapping[str, tuple[str, ...]] = {
    "attention": ("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa",
                  "self_attn.k_proj", "self_attn.o_proj"),
    "experts": ("mlp.experts.0.gate_proj", "mlp.experts.0.down_proj",
                "block_sparse_moe.experts.0.w1", "feed_forward.experts.0.gate_proj"),
    "shared": ("mlp.shared_experts.gate_proj", "mlp.shared_expert.gate_proj",
               "feed_forward.shared_expert.gate_proj"),
    "dense": ("mlp.gate_proj", "mlp.down_proj", "feed_forward.gate_proj"),
}  # fmt: skip
"""After `model.layers.N.`; each family has some of them."""


_PREFIXES = ("model.", "language_model.model.", "model.language_model.")
"""Before `layers.N.`: of language models, and of those that are part of a multi-modal one."""


def names_of(kind: str, layer: int) -> tuple[str, ...]:
    """List the modules of a kind in a layer, as any family may call them."""
    return tuple(
        f"{prefix}layers.{layer}.{module}" for module in KINDS[kind] for prefix in _PREFIXES
    )


@dataclass(frozen=True)
class ModuleNames:
    """A list of modules: names, parents' names, wildcards, `re:` and an expression, or classes."""

    patterns: tuple[str, ...]

    def has(self, names: Sequence[str]) -> bool:
        """Say whether one of these modules, or what it is part of, is listed."""
        return (
            any(parent in self._plain for name in names for parent in _parents(name))
            or any(part in self._parts for name in names for part in name.split("."))
            or any(expression.match(name) for expression in self._expressions for name in names)
        )

    def covers(self, kind: str, names: Sequence[str]) -> bool:
        """Say whether a group's targets, which may also be classes of modules, include this kind."""
        if "Linear" in self.patterns:
            return True
        experts = any("moe" in word.lower() or "expert" in word.lower() for word in self._classes)
        return (kind == "experts" and experts) or self.has(names)

    @cached_property
    def _plain(self) -> frozenset[str]:
        return frozenset(
            pattern
            for pattern in self.patterns
            if "." in pattern and "*" not in pattern and not pattern.startswith("re:")
        )

    @cached_property
    def _parts(self) -> frozenset[str]:
        """Names without a dot mean every module of that name."""
        return frozenset(
            pattern
            for pattern in self.patterns
            if "." not in pattern and "*" not in pattern and not pattern.startswith("re:")
        )

    @cached_property
    def _classes(self) -> list[str]:
        return [pattern for pattern in self._parts if pattern[:1].isupper()]

    @cached_property
    def _expressions(self) -> list[re.Pattern[str]]:
        found = [_compiled(pattern) for pattern in self.patterns if pattern.startswith("re:")]
        for pattern in self.patterns:
            if "*" in pattern and not pattern.startswith("re:"):
                found += [re.compile(translate(form)) for form in (pattern, f"{pattern}.*")]
        return found


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise DwdpConfigError(
            f"quantization_config of config.json lists {shown(pattern)}: {error}."
        ) from error
