"""The thread that answers: accepts, reads one request, replies, closes.

It never blocks on a connection, so that a slow, silent or hostile peer delays no other; every
connection has a deadline, and their number is bounded.
"""

import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from vllm_dwdp.distributed import messages
from vllm_dwdp.distributed.connection import Connection
from vllm_dwdp.errors import RendezvousError
from vllm_dwdp.logger import init_logger

logger = init_logger(__name__)

CONNECTION_DEADLINE_S = 5.0
MAX_CONNECTIONS = 256
WARNING_INTERVAL_S = 10.0

Answer = Callable[[messages.Request], Iterable[messages.Packet]]


@dataclass
class _Conversation:
    """One connection: first the request is awaited, then `rest` of the reply is sent."""

    connection: Connection
    deadline: float
    rest: Iterator[messages.Packet] | None = None
    unsent: messages.Packet | None = None


class Server:
    """Answers at `listener` in a daemon thread until `close`. Owns the listener.

    Args:
        listener: a listening, non-blocking socket.
        greet: makes the connection of an accepted socket, or None for one that is turned away.
        answer: makes the packets of a reply, in the thread; their descriptors must stay open.
        on_drop: called, in the thread, for each connection that was no peer's.
        who: who listens, for the log and the name of the thread.
    """

    def __init__(
        self,
        listener: socket.socket,
        greet: Callable[[socket.socket], Connection | None],
        answer: Answer,
        on_drop: Callable[[], None],
        who: str,
    ) -> None:
        self._listener = listener
        self._greet = greet
        self._answer = answer
        self._on_drop = on_drop
        self._who = who
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._open: dict[socket.socket, _Conversation] = {}
        self._last_warning = 0.0
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name=f"dwdp {who}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread and close every socket."""
        self._wake_writer.send(b"x")
        self._thread.join()
        for sock in list(self._open):
            self._drop(sock)
        self._selector.close()
        for owned in (self._listener, self._wake_reader, self._wake_writer):
            owned.close()

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select(timeout=1.0):
                if key.fileobj is self._wake_reader:
                    return
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    assert isinstance(key.fileobj, socket.socket)
                    self._serve(key.fileobj)
            now = time.monotonic()
            for sock in [s for s, open_ in self._open.items() if open_.deadline < now]:
                self._drop(sock)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            self._warn("a connection could not be accepted: %s", error)
            time.sleep(0.01)
            return
        if len(self._open) >= MAX_CONNECTIONS:
            self._make_room()
        try:
            sock.setblocking(False)
            connection = self._greet(sock)
        except OSError:
            connection = None
        if connection is None or len(self._open) >= MAX_CONNECTIONS:
            sock.close()
            return
        deadline = time.monotonic() + CONNECTION_DEADLINE_S
        self._open[sock] = _Conversation(connection, deadline)
        self._selector.register(sock, selectors.EVENT_READ)

    def _make_room(self) -> None:
        """Close the connection that has been silent longest, for one that may not be."""
        silent = (s for s, conversation in self._open.items() if conversation.rest is None)
        oldest = next(silent, None)
        if oldest is not None:
            self._drop(oldest)

    def _serve(self, sock: socket.socket) -> None:
        conversation = self._open.get(sock)
        if conversation is None:
            return  # made room for another one meanwhile
        try:
            if self._go_on(sock, conversation):
                return
        except ConnectionError:
            pass  # it only looked whether we are alive, or died meanwhile
        except (OSError, RendezvousError) as error:
            self._on_drop()
            self._warn("a connection was closed that is no peer's: %s", error)
        except Exception as error:  # a bug: the thread must go on answering other peers
            self._on_drop()
            self._warn("a request could not be answered: %s", error, with_trace=True)
        self._drop(sock)

    def _go_on(self, sock: socket.socket, conversation: _Conversation) -> bool:
        """Read the request or send more of the reply; whether anything is left to do."""
        connection = conversation.connection
        if conversation.rest is None:
            request = connection.receive_request()
            if request is None:
                return True
            conversation.rest = iter(self._answer(request))
            conversation.unsent = next(conversation.rest, None)
            self._selector.modify(sock, selectors.EVENT_WRITE)
        while conversation.unsent is not None:
            try:
                connection.send_message(*conversation.unsent)
            except BlockingIOError:
                return True
            conversation.unsent = next(conversation.rest, None)
        return not connection.flush()

    def _drop(self, sock: socket.socket) -> None:
        self._open.pop(sock, None)
        with suppress(KeyError, ValueError):
            self._selector.unregister(sock)
        sock.close()

    def _warn(self, text: str, error: Exception, *, with_trace: bool = False) -> None:
        """At most one line in ten seconds: a hostile peer must not fill the log."""
        now = time.monotonic()
        if now - self._last_warning > WARNING_INTERVAL_S:
            self._last_warning = now
            logger.warning("DWDP %s: " + text, self._who, error, exc_info=with_trace)
