"""Which variables of vLLM's keep the ranks of a launch from serving as it needs them."""

from collections.abc import Mapping

from vllm_dwdp.errors import DwdpConfigError

RUST_FRONT_END = "VLLM_USE_RUST_FRONTEND"
PLUGINS = "VLLM_PLUGINS"
PLUGIN = "dwdp"
"""The name of our entry point."""


def check_environment(environment: Mapping[str, str]) -> None:
    """Refuse settings of vLLM's that the ranks of a launch could not be asked with.

    Raises:
        DwdpConfigError: another HTTP server than vLLM's own was chosen, or this plugin was not.
    """
    allowed = environment.get(PLUGINS)
    if allowed is not None and PLUGIN not in allowed.split(","):
        raise DwdpConfigError(
            f"{PLUGINS}={allowed} keeps vLLM from loading this plugin. Add it: "
            f"{PLUGINS}={','.join(filter(None, [allowed, PLUGIN]))}"
        )
    if environment.get(RUST_FRONT_END, "0") not in ("", "0"):
        raise DwdpConfigError(
            f"{RUST_FRONT_END}={environment[RUST_FRONT_END]} cannot be used with launch: that server "
            "has no middleware, by which a rank tells the router's requests apart. Unset it."
        )
