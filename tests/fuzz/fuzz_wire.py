"""Coverage-guided fuzzing of `tests.fuzz.readers`: `make fuzz` (needs atheris).

A finding leaves its input in a file `crash-*`. The msgpack decoder itself is C and not instrumented;
what is guided is our own code around it, from a corpus of real messages.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["vllm_dwdp.distributed"]):
    from tests.fuzz.readers import fuzz, write_corpus

if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="dwdp-fuzz-") as made:
        write_corpus(Path(made))
        atheris.Setup([sys.argv[0], made, *sys.argv[1:]], fuzz)
        atheris.Fuzz()
