"""The stand-ins for kernels that vLLM lacks on CPUs: how they are named, and the rule of one of them."""

import torch

from tests.helpers.missing_kernels import NAMES, PLUGINS, environment, said
from tests.helpers.missing_kernels.delta import attend


def test_programs_find_the_plugin_and_the_names_beside_what_they_have() -> None:
    found = environment(("mamba_1", "zero_experts"), {"PYTHONPATH": "/theirs", "OTHER": "1"})
    assert found["PYTHONPATH"].split(":")[1:] == [str(PLUGINS), "/theirs"]
    assert (found[NAMES], found["OTHER"]) == ("mamba_1,zero_experts", "1")
    assert list(PLUGINS.glob("*.dist-info/entry_points.txt"))
    assert said(("mamba_1", "zero_experts")) == "with mamba 1 and zero experts in torch"


def test_a_key_of_the_delta_rule_knows_what_it_was_told_last() -> None:
    size = 4
    keys, values = torch.eye(size)[:, None], torch.rand(size, 1, size)
    nothing_forgotten, all_of_it = torch.full((size, 1, size), -1e3), torch.full((size, 1), 1e3)
    given = keys, keys, values, nothing_forgotten, all_of_it, torch.zeros(1), torch.zeros(size)
    seen, state = attend(*given, torch.zeros(1, size, size))
    assert torch.allclose(seen, values / size**0.5)
    assert torch.allclose(state[0], values[:, 0])
    told_again = keys, keys, values + 1, *given[3:]
    assert torch.allclose(attend(*told_again, state)[1][0], values[:, 0] + 1)
