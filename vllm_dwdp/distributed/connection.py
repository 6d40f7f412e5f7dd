"""One connection that carries whole messages: a Unix seqpacket socket, or an authenticated TCP one.

A connection blocks as its socket does: the dialling side gives the whole exchange a deadline, so that a
peer which trickles bytes holds no other up; the answering thread makes it non-blocking. Closing a
connection closes its socket.
"""

import socket
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

from vllm_dwdp.distributed import messages
from vllm_dwdp.distributed.messages import MAX_MESSAGE_BYTES, close_all
from vllm_dwdp.distributed.secure import SecureChannel
from vllm_dwdp.errors import ProtocolError, RendezvousError, SecretMismatchError

READ_BYTES = 64 * 1024
_INT = struct.Struct("i")


class Connection(ABC):
    """One end of a conversation with another rank.

    Args:
        sock: connected; owned from now on.
        deadline: of everything on this connection, by the monotonic clock; None leaves the socket as
            it is.
    """

    def __init__(self, sock: socket.socket, deadline: float | None) -> None:
        self.sock = sock
        self._deadline = deadline

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; what was sent still arrives."""
        self.sock.close()

    @abstractmethod
    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send the bytes of one message and, with them, copies of `fds`.

        Raises:
            BlockingIOError: nothing was sent; try again later.
        """

    @abstractmethod
    def flush(self) -> bool:
        """Send what `send` kept back; whether nothing is left."""

    @abstractmethod
    def receive(self, max_fds: int) -> tuple[bytes, list[int]] | None:
        """Return one message's bytes and descriptors, owned by the caller; None if none is there.

        Raises:
            ProtocolError: it is longer, or brings more descriptors, than allowed, or is not authentic.
            ConnectionError: the peer closed the connection.
        """

    def send_message(
        self, message: messages.Request | messages.Reply, fds: Sequence[int] = ()
    ) -> None:
        """Send one message and, with it, copies of `fds`; as `send`."""
        self.send(messages.encode(message), fds)

    def receive_request(self) -> messages.Request | None:
        """Receive one request, or None if it is not there yet; requests carry no descriptors.

        Raises:
            ProtocolError: it is too long, not authentic, not a request, or came with descriptors.
        """
        received = self.receive(0)
        return None if received is None else messages.decode_request(received[0])

    def receive_reply(self) -> tuple[messages.Reply, list[int]]:
        """Receive one reply and its descriptors, owned by the caller (blocking).

        Raises:
            ProtocolError: it is too long, not authentic or not a reply; its descriptors are closed.
        """
        received = self.receive(messages.FDS_PER_MESSAGE)
        if received is None:
            raise TimeoutError("the peer has sent no reply")
        data, fds = received
        try:
            return messages.decode_reply(data), fds
        except BaseException:
            close_all(fds)
            raise

    def receive_handles(self, header: messages.Shard) -> tuple[list[int], list[bytes]]:
        """Receive the handles that follow `header`; see `messages.collect_handles`."""
        return messages.collect_handles(header, self.receive_reply)

    def _limit_next_call(self) -> None:
        """Let the next call on the socket take at most what is left of the time.

        Raises:
            TimeoutError: nothing is left.
        """
        if self._deadline is not None:
            left_s = self._deadline - time.monotonic()
            if left_s <= 0:
                raise TimeoutError("the exchange took longer than its deadline")
            self.sock.settimeout(left_s)


class PacketConnection(Connection):
    """Messages over a Unix seqpacket socket; the kernel keeps them whole and carries descriptors."""

    def __init__(self, sock: socket.socket, deadline: float | None = None) -> None:
        super().__init__(sock, deadline)

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """As `Connection.send`."""
        self._limit_next_call()
        if fds:
            socket.send_fds(self.sock, [data], list(fds))
        else:
            self.sock.send(data)

    def flush(self) -> bool:
        """Return true: nothing is ever kept back."""
        return True

    def receive(self, max_fds: int) -> tuple[bytes, list[int]] | None:
        """As `Connection.receive`.

        Raises:
            RendezvousError: this process may not open so many files.
        """
        self._limit_next_call()
        # Not socket.recv_fds: it ignores its flags, and a child forked meanwhile would inherit.
        room = socket.CMSG_LEN(max_fds * _INT.size) if max_fds else 0
        try:
            data, ancillary, flags, _ = self.sock.recvmsg(
                MAX_MESSAGE_BYTES, room, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return None
        fds: list[int] = []
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                whole = len(content) - len(content) % _INT.size
                fds += [fd for (fd,) in _INT.iter_unpack(content[:whole])]
        if not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            if not data and not fds:
                raise ConnectionResetError("the peer closed the connection")
            return data, fds
        close_all(fds)
        if flags & socket.MSG_CTRUNC and len(fds) < max_fds:
            raise RendezvousError(
                "the descriptors of a peer's shard could not all be opened: this process reached "
                "its limit of open files (RLIMIT_NOFILE). Raise it, e.g. with `ulimit -n 65536` or "
                "LimitNOFILE= of a systemd unit."
            )
        raise ProtocolError(
            f"a peer sent more than {MAX_MESSAGE_BYTES} bytes or {max_fds} file descriptors"
        )


class SecureConnection(Connection):
    """Messages over a TCP socket between two ends that know the secret; carries no descriptors.

    Args:
        sock: connected; owned from now on.
        secret: what both ends know.
        purpose: whom the dialler wants to reach.
        listens: whether this end accepted the connection.
        deadline: as `Connection`.
    """

    def __init__(
        self,
        sock: socket.socket,
        secret: bytes,
        purpose: bytes,
        *,
        listens: bool,
        deadline: float | None = None,
    ) -> None:
        super().__init__(sock, deadline)
        self._channel = SecureChannel(secret, purpose, listens=listens, max_bytes=MAX_MESSAGE_BYTES)

    def shake_hands(self) -> None:
        """Authenticate both ends (the dialling side; blocks).

        Raises:
            SecretMismatchError: one end does not know the other's secret.
            ProtocolError: no rank listens there.
            OSError: the peer closed the connection or took too long.
        """
        while not self._channel.is_open:
            self._read()
            self.flush()

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """As `Connection.send`; the rest of a message that did not fit waits for `flush`.

        Raises:
            BlockingIOError: an earlier message still waits.
            OSError: the peer closed the connection.
        """
        assert not fds, "descriptors cannot travel over TCP"
        if not self.flush():
            raise BlockingIOError
        self._channel.send(data)
        self.flush()

    def flush(self) -> bool:
        """As `Connection.flush`."""
        outgoing = self._channel.outgoing
        try:
            while outgoing:
                self._limit_next_call()
                del outgoing[: self.sock.send(outgoing)]
        except BlockingIOError:
            return False
        return True

    def receive(self, max_fds: int) -> tuple[bytes, list[int]] | None:
        """As `Connection.receive`; there are never descriptors.

        Raises:
            SecretMismatchError: the peer does not know the secret.
        """
        while True:
            try:
                payload = self._read()
            except BlockingIOError:
                return None
            except SecretMismatchError:
                self.flush()  # say so to a rank that was given another file
                raise
            self.flush()
            if payload is not None:
                return payload, []

    def _read(self) -> bytes | None:
        self._limit_next_call()
        data = self.sock.recv(min(self._channel.num_wanted, READ_BYTES))
        if not data:
            raise ConnectionResetError("the peer closed the connection")
        return self._channel.feed(data)
