"""A step of a rank, and the seconds of a layer by part. Pure."""

from dataclasses import dataclass
from operator import add
from typing import NamedTuple

QUERY_TILE = 128.0
"""Tokens of a prompt that share one reading of the keys before them."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One forward step of a rank: `num_tokens` new tokens, each attending to `mean_keys` keys.

    Args:
        tokens_per_reading: tokens that share one reading of their keys: `QUERY_TILE` of a prompt; one
            if each belongs to a sequence of its own.
    """

    num_tokens: float
    mean_keys: float
    tokens_per_reading: float = QUERY_TILE

    @classmethod
    def prefill(cls, num_tokens: float, input_tokens: float) -> "Step":
        """Compute prompts of `input_tokens`, causal: a token sees half of its prompt on average.

        Also where a prompt takes several steps: the later ones see the keys of the earlier ones, and
        this is the mean of them all.
        """
        return cls(num_tokens=num_tokens, mean_keys=input_tokens / 2)

    @classmethod
    def decode(cls, batch_size: float, context_tokens: float) -> "Step":
        """Compute one new token of each of `batch_size` sequences."""
        return cls(num_tokens=batch_size, mean_keys=context_tokens, tokens_per_reading=1.0)


class LayerSeconds(NamedTuple):
    """One layer of one rank, or several, seconds by part.

    Args:
        linear: dense matrix products: projections, shared experts, dense feed-forwards.
        attention: the products of queries, keys and values, and an indexer's before them.
        experts: the grouped products of the routed experts.
        other: everything else, bound by memory.
    """

    linear: float
    attention: float
    experts: float
    other: float

    @property
    def before_experts(self) -> float:
        """The seconds of what a rank does for its own tokens only."""
        return self.linear + self.attention + self.other

    @property
    def compute(self) -> float:
        """The total compute time."""
        return self.before_experts + self.experts

    def and_feed_forward(self, *, linear: float, experts: float) -> "LayerSeconds":
        """Add the products of a feed-forward."""
        return self._replace(linear=self.linear + linear, experts=self.experts + experts)

    def times(self, number: float) -> "LayerSeconds":
        """Multiply every part by a number of layers."""
        return LayerSeconds(*(number * part for part in self))

    def plus(self, more: "LayerSeconds") -> "LayerSeconds":
        """Add two times part by part."""
        return LayerSeconds(*map(add, self, more))
