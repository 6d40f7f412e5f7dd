"""Reading an endpoint from what the user wrote, or making one that cannot be guessed.

::

    unix:///folder              a folder the ranks share; rank r of group g listens on g<g>-r<r>.sock
    abstract:<name>             Linux abstract socket names: nothing on the file system
    tcp://host[,host...]:port   several hosts of one NVLink domain; needs a shared secret
"""

import secrets

from vllm_dwdp.distributed.endpoint import Endpoint
from vllm_dwdp.distributed.tcp import TcpEndpoint
from vllm_dwdp.distributed.unix import AbstractEndpoint, UnixEndpoint
from vllm_dwdp.errors import DwdpConfigError


def parse_endpoint(text: str, group_size: int = 1, secret_file: str | None = None) -> Endpoint:
    """Read one of the three forms.

    Args:
        group_size: ranks of a group; `tcp://` spreads them over hosts and ports.
        secret_file: needed for `tcp://` only; read here, and never again.

    Raises:
        DwdpConfigError: the text is none of them, or the secret is missing or unusable.
    """
    if text.startswith("tcp://"):
        return TcpEndpoint.parse(text, group_size, secret_file)
    if secret_file is not None:
        raise DwdpConfigError(
            f"dwdp rendezvous_secret_file={secret_file!r} is used by tcp:// only; {text!r} is "
            "guarded by its folder and by the user id. Leave the secret out."
        )
    if text.startswith("unix://") and text.removeprefix("unix://").startswith("/"):
        return UnixEndpoint(text.removeprefix("unix://"))
    if text.startswith("abstract:") and text != "abstract:":
        return AbstractEndpoint(text.removeprefix("abstract:"))
    raise DwdpConfigError(
        f"dwdp rendezvous={text!r} is not a meeting place; use unix:///absolute/folder (shared "
        "by the ranks of one host)."
    )


def make_abstract_endpoint() -> AbstractEndpoint:
    """Make an endpoint that no other user can guess, with nothing on the file system."""
    return AbstractEndpoint(secrets.token_hex(16))
