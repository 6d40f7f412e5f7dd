"""Mutual authentication and authenticated frames for `tcp://`, without any I/O.

Both ends know a secret. Nothing is hidden from who listens (handles are worth nothing outside the
NVLink domain), but no process without the secret is answered, and no byte can be changed, replayed,
reordered or passed on to another rank unseen:

::

    listener -> dialler    MAGIC, listener nonce
    dialler  -> listener   MAGIC, dialler nonce, HMAC(secret, "dialler" + transcript)
    listener -> dialler    1, HMAC(secret, "listener" + transcript)      or 0 and zeros: refused
    either   -> other      length, payload, HMAC(key of this direction, number of the frame + both)

The transcript is both nonces and whom the dialler wants to reach; the keys are HMACs of it too. A
listener proves nothing to who has not proved itself. Lengths are checked before anything is kept.
"""

import hashlib
import hmac
import secrets
import struct
from enum import Enum

from vllm_dwdp.errors import ProtocolError, SecretMismatchError

MAGIC = b"DWDPv1\r\n"
NONCE_BYTES = 32
TAG_BYTES = hashlib.sha256().digest_size
_LENGTH = struct.Struct(">I")
_NUMBER = struct.Struct(">Q")
_REFUSED, _ACCEPTED = b"\0", b"\1"


class _Awaits(Enum):
    """What the peer is to send next; the value is its size in bytes where that is fixed."""

    GREETING = len(MAGIC) + NONCE_BYTES
    PROOF = len(MAGIC) + NONCE_BYTES + TAG_BYTES
    VERDICT = 1 + TAG_BYTES
    LENGTH = _LENGTH.size
    PAYLOAD = -1


class SecureChannel:
    """One end of a connection, as a machine that bytes are fed to.

    Args:
        secret: what both ends know.
        purpose: whom the dialler wants to reach; equal on both ends.
        listens: whether this end accepted the connection.
        max_bytes: of one payload.
    """

    def __init__(self, secret: bytes, purpose: bytes, *, listens: bool, max_bytes: int) -> None:
        self.outgoing = bytearray()
        self._secret = secret
        self._purpose = purpose
        self._listens = listens
        self._max_bytes = max_bytes
        self._incoming = bytearray()
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._transcript = b""
        self._length = 0
        self._num_sent = self._num_received = 0
        self._awaits = _Awaits.PROOF if listens else _Awaits.GREETING
        if listens:
            self.outgoing += MAGIC + self._nonce

    @property
    def is_open(self) -> bool:
        """Whether both ends have proved that they know the secret, as far as this end can tell."""
        return self._awaits in (_Awaits.LENGTH, _Awaits.PAYLOAD)

    @property
    def num_wanted(self) -> int:
        """How many bytes may be fed next; never more than one frame."""
        if self._awaits is _Awaits.PAYLOAD:
            return self._length + TAG_BYTES - len(self._incoming)
        return int(self._awaits.value) - len(self._incoming)

    def feed(self, data: bytes) -> bytes | None:
        """Take at most `num_wanted` bytes from the peer; a payload once one is complete.

        Raises:
            ProtocolError: the peer speaks something else, or a frame is too long or not authentic.
            SecretMismatchError: the peer does not know the secret, or says that we do not.
        """
        assert len(data) <= self.num_wanted
        self._incoming += data
        if self.num_wanted:
            return None
        received = bytes(self._incoming)
        self._incoming.clear()
        if self._awaits is _Awaits.PAYLOAD:
            return self._take_payload(received)
        if self._awaits is _Awaits.LENGTH:
            self._take_length(received)
        elif self._awaits is _Awaits.GREETING:
            self._take_greeting(received)
        elif self._awaits is _Awaits.PROOF:
            self._take_proof(received)
        else:
            self._take_verdict(received)
        return None

    def send(self, payload: bytes) -> None:
        """Append one frame to `outgoing`."""
        assert self.is_open and len(payload) <= self._max_bytes
        length = _LENGTH.pack(len(payload))
        self.outgoing += length + payload
        self.outgoing += self._tag(self._listens, self._num_sent, length + payload)
        self._num_sent += 1

    def _take_greeting(self, received: bytes) -> None:
        nonce = self._after_magic(received)
        self._transcript = nonce + self._nonce + self._purpose
        self.outgoing += MAGIC + self._nonce + self._prove(b"dialler")
        self._awaits = _Awaits.VERDICT

    def _take_proof(self, received: bytes) -> None:
        rest = self._after_magic(received)
        nonce, proof = rest[:NONCE_BYTES], rest[NONCE_BYTES:]
        self._transcript = self._nonce + nonce + self._purpose
        if not hmac.compare_digest(proof, self._prove(b"dialler")):
            self.outgoing += _REFUSED + bytes(TAG_BYTES)
            raise SecretMismatchError(
                "the peer does not know this rank's secret, or dialled another rank"
            )
        self.outgoing += _ACCEPTED + self._prove(b"listener")
        self._awaits = _Awaits.LENGTH

    def _take_verdict(self, received: bytes) -> None:
        if received[:1] == _REFUSED:
            raise SecretMismatchError("the peer refused this rank's secret, or is another rank")
        if not hmac.compare_digest(received, _ACCEPTED + self._prove(b"listener")):
            raise SecretMismatchError("the peer did not prove that it knows this rank's secret")
        self._awaits = _Awaits.LENGTH

    def _take_length(self, received: bytes) -> None:
        (self._length,) = _LENGTH.unpack(received)
        if self._length > self._max_bytes:
            raise ProtocolError(
                f"a peer announced a message of {self._length} bytes; at most {self._max_bytes} "
                "are taken"
            )
        self._awaits = _Awaits.PAYLOAD

    def _take_payload(self, received: bytes) -> bytes:
        payload, tag = received[:-TAG_BYTES], received[-TAG_BYTES:]
        signed = _LENGTH.pack(len(payload)) + payload
        if not hmac.compare_digest(tag, self._tag(not self._listens, self._num_received, signed)):
            raise ProtocolError(
                f"a message of {len(payload)} bytes is not authentic: changed, repeated or moved"
            )
        self._num_received += 1
        self._awaits = _Awaits.LENGTH
        return payload

    def _after_magic(self, received: bytes) -> bytes:
        if not received.startswith(MAGIC):
            raise ProtocolError(
                "what listens or dials there is no rank: it does not speak this protocol"
            )
        return received[len(MAGIC) :]

    def _prove(self, role: bytes) -> bytes:
        return hmac.digest(self._secret, role + self._transcript, "sha256")

    def _tag(self, by_listener: bool, number: int, signed: bytes) -> bytes:
        key = self._prove(b"key of the listener" if by_listener else b"key of the dialler")
        return hmac.digest(key, _NUMBER.pack(number) + signed, "sha256")
