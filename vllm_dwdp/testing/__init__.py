"""Random-weight checkpoints for the demo, the tests and the benchmarks. Imports transformers."""
