"""The readers that `make fuzz` drives, on their corpus and on random changes of it; here unguided."""

import random
from pathlib import Path

import pytest

from tests.fuzz import readers
from vllm_dwdp.errors import ProtocolError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("corpus")
    readers.write_corpus(folder)
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def test_the_corpus_reaches_every_reader(corpus: dict[str, bytes]) -> None:
    assert {data[0] % len(readers.READERS) for data in corpus.values()} == set(
        range(len(readers.READERS))
    )
    for data in corpus.values():
        readers.fuzz(data)


def test_real_messages_are_read_and_answered(corpus: dict[str, bytes]) -> None:
    """The corpus is worth starting from: requests pass as requests, replies as replies."""
    num_read = [0, 0]
    for name, data in corpus.items():
        if data[0] < 2:
            try:
                readers.READERS[data[0]](data[1:])
                num_read[data[0]] += 1
            except ProtocolError:
                assert name.partition("-")[0] == str(data[0])
    assert num_read == [8, 8]


def test_changed_bytes_end_in_named_errors(corpus: dict[str, bytes]) -> None:
    dice = random.Random(11)
    for _ in range(3000):
        changed = bytearray(dice.choice(list(corpus.values())))
        for _ in range(dice.randrange(1, 8)):
            changed[dice.randrange(1, len(changed))] = dice.randrange(256)
        readers.fuzz(bytes(changed[: dice.randrange(2, len(changed) + 1)]))
