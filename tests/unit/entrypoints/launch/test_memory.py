"""Ranks and stock decode servers that divide the memory of one machine."""

import pytest

from vllm_dwdp.entrypoints.launch.memory import USED, divide_memory, says_how_much

GIB = 2**30


@pytest.mark.parametrize("decode_workers", [[1], [1, 1], [2]])
@pytest.mark.parametrize("model_bytes", [0, 2 * GIB])
def test_everybody_has_weights_and_as_much_cache_as_the_others(
    decode_workers: list[int], model_bytes: int
) -> None:
    shares = divide_memory(2, decode_workers, model_bytes, 24 * GIB)
    num_decode = sum(decode_workers)
    assert 2 * shares.rank + num_decode * shares.decode == pytest.approx(USED)
    of_rank = 24 * GIB * shares.rank - model_bytes / 2
    of_decode = 24 * GIB * shares.decode - model_bytes * len(decode_workers) / num_decode
    assert of_rank == pytest.approx(of_decode) and of_rank > 3 * GIB


def test_weights_that_do_not_fit_are_for_vllm_to_name() -> None:
    shares = divide_memory(2, [1], 20 * GIB, 24 * GIB)
    assert shares.rank == shares.decode == pytest.approx(USED / 3)


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        ([], {}, False),
        ([], {"VLLM_CPU_KVCACHE_SPACE": ""}, False),
        ([], {"VLLM_CPU_KVCACHE_SPACE": "4"}, True),
        (["--gpu_memory_utilization=0.2"], {}, True),
        (["--kv-cache-memory-bytes", "1"], {}, True),
        (["--max-model-len", "1"], {}, False),
    ],
)
def test_what_the_user_says_counts(
    arguments: list[str], environment: dict[str, str], said: bool
) -> None:
    assert says_how_much(arguments, environment) is said
