"""Answers of a model that makes its tokens of noise, which is the same each time."""

import random
from typing import Any

import numpy
import torch

from tests.e2e.engine_process import PROMPTS, generate


def answer(engine: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Return the tokens for every prompt; vLLM lets no request choose a seed or a temperature."""
    tokens = []
    for number, text in enumerate(PROMPTS):
        for seed in (random.seed, numpy.random.seed, torch.manual_seed):
            seed(number)
        tokens.append(generate(engine, number, text, temperature=1.0))
    return {"tokens": tokens}
