"""Every error that vllm-dwdp raises on purpose.

::

    DwdpError
    ├── DwdpConfigError (also ValueError)    what the user asked for cannot be done
    ├── DwdpUnsupportedError (also ValueError)  this model or feature cannot run under DWDP
    ├── NativeLibraryError (also ImportError)  the C++ library is missing or does not fit
    ├── DwdpMemoryError (also MemoryError)   a shard, mapping or slot cannot be made
    ├── TransferError                        a copy or an event failed
    ├── WeightUpdateError                    new weights did not reach every rank of the group
    └── RendezvousError                      ranks could not meet
        ├── JoinTimeoutError (also TimeoutError)  peers never came; names the missing ranks
        ├── PeerMismatchError                a peer holds another model, layout or version
        ├── SecretMismatchError              a tcp:// peer does not know the shared secret
        └── ProtocolError                    a peer spoke nonsense

A message says what failed, the value seen, what is required, and the next step. `assert` is for our
own invariants only.
"""


class DwdpError(Exception):
    """Base of every error raised by vllm-dwdp."""


class DwdpConfigError(DwdpError, ValueError):
    """A setting is unknown, malformed or contradicts another one."""


class DwdpUnsupportedError(DwdpError, ValueError):
    """The model, or a vLLM feature that was asked for, cannot run under DWDP."""


class NativeLibraryError(DwdpError, ImportError):
    """The C++ library is missing, too old or cannot be loaded."""


class DwdpMemoryError(DwdpError, MemoryError):
    """Shared expert memory could not be created, mapped or sealed."""


class TransferError(DwdpError):
    """A copy between ranks failed."""


class WeightUpdateError(DwdpError):
    """New weights were not begun, or did not reach every rank of the group."""


class RendezvousError(DwdpError):
    """The ranks of a group could not meet."""


class JoinTimeoutError(RendezvousError, TimeoutError):
    """Peers did not appear before the deadline."""


class PeerMismatchError(RendezvousError):
    """A peer's fingerprint differs from ours."""


class SecretMismatchError(RendezvousError):
    """One end of a `tcp://` connection does not know the other's secret."""


class ProtocolError(RendezvousError):
    """A message could not be decoded or came at the wrong time."""
