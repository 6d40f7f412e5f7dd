"""Every scenario of `scenarios.py`, on a GPU."""

import pytest

from tests.gpu.running import FACTS, run_scenario, why_not
from tests.gpu.scenarios import SCENARIOS

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(320)]

CASES = [(name, argument) for name, arguments in SCENARIOS.items() for argument in arguments]


@pytest.mark.parametrize(("scenario", "argument"), CASES)
def test_on_a_gpu(scenario: str, argument: str) -> None:
    if reason := why_not(scenario):
        pytest.skip(reason)
    outcome = run_scenario(scenario, argument)
    print(outcome.output)
    assert outcome.passed or scenario in FACTS, outcome.output[-6000:]
