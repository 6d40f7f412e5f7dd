"""Which vLLM the contracts are checked against."""


def vllm_minor() -> tuple[int, int]:
    """Return the first two numbers of its version."""
    from vllm.version import __version__

    major, minor = __version__.split(".")[:2]
    return int(major), int(minor)
