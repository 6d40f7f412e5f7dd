"""What holds for every test process."""

from vllm_dwdp.entrypoints.launch.process import hear_ignored_signals

# `make test &` in a script starts pytest with SIGINT ignored; the programs that tests start must
# not inherit that.
hear_ignored_signals()
