"""One loader process for all processes of a machine: the first of them starts it, the others connect to it.

The address is an abstract one, of Linux: a name that is gone with the sockets, and no file. Elsewhere each process has
a loader of its own. A client says who it is, a number on a line, and gets the descriptor of the ring's memory; then
both send JSON lines as `data.subprocesses` has them.
"""

import array
import contextlib
import json
import os
import queue
import secrets
import socket
import struct
import sys
import threading
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from data.errors import LoaderDied
from data.rows import WHOLE, Part
from data.subprocesses import encode

__all__ = ["ALONE", "Clients", "Connection", "LocalRanks", "can_share", "connect", "listen"]


class LocalRanks(NamedTuple):
    """The processes of a machine that share one loader process, as one of them sees them; by default it is alone."""

    parts: Sequence[Part] = (WHOLE,)
    """the rows of a global batch that each gets; one part may be that of several"""
    rank: int = 0
    """of this one among them: 0 starts the loader's process"""
    endpoint: Optional[socket.socket] = None
    """where there are several: that of rank 0 listens, those of the others are connected to it. The loader keeps what
    it needs of it: close it when the loader is open"""


ALONE = LocalRanks()


def can_share() -> bool:
    return sys.platform == "linux"


def listen() -> Tuple[socket.socket, str]:
    """A socket to which processes of the same user `connect`, and its address."""
    address = f"bert-loader-{secrets.token_hex(16)}"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"\0{address}")
    listener.listen(4096)  # they need not wait for the loader's process
    return listener, address


def connect(address: str, rank: int) -> socket.socket:
    """A socket for the process of this rank. Raises LoaderDied where nobody listens any more."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(f"\0{address}")
        connection.sendall(encode(rank))
    except OSError as error:
        connection.close()
        raise LoaderDied(f"the first process of this machine, which starts the loader, has ended ({error.strerror})")
    return connection


class Connection:
    """What `data.subprocesses.ChildProcess` is to the process that started it, to another."""

    def __init__(self, connection: socket.socket):
        self.output = connection.dup()

    def send(self, line: bytes) -> None:
        with contextlib.suppress(OSError):
            self.output.sendall(line)

    def receive_descriptor(self) -> int:
        """Waits for the loader's process, and returns the descriptor of its memory, to be closed."""
        with contextlib.suppress(OSError):
            _, messages, *_ = self.output.recvmsg(1, socket.CMSG_SPACE(4))
            for _, _, packed in messages:
                return array.array("i", packed)[0]
        self.end()
        raise LoaderDied(f"the loader's process {self.how_it_ended()}")

    def how_it_ended(self) -> str:
        return "has ended, or the first process of this machine, which starts it: see the error of that one"

    def end(self) -> None:
        self.output.close()


class Clients:
    """In the loader's process: those that connect, at most `count` - 1 of them. `messages` gets what they send, and
    [rank, None] as one has ended. `listener`, `memory`: descriptors."""

    def __init__(self, listener: Optional[int], count: int, memory: int, messages: queue.Queue):
        self.memory, self.messages, self.lock = memory, messages, threading.Lock()
        self.connected: Dict[int, socket.socket] = {}
        self.not_connected: Dict[int, List[bytes]] = {rank: [] for rank in range(1, count)}  # what it missed so far
        if listener is not None:
            threading.Thread(target=self.accept, args=(socket.socket(fileno=listener),), daemon=True).start()

    def reply(self, message: Any) -> None:
        """Sends a message to all, to those that connect later, too."""
        line = encode(message)
        with self.lock:
            for missed in self.not_connected.values():
                missed.append(line)
            for connection in self.connected.values():
                with contextlib.suppress(OSError):  # it has ended: `talk` notices
                    connection.sendall(line)

    def accept(self, listener: socket.socket) -> None:
        with listener, contextlib.suppress(OSError):  # shut down as all are there
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=self.talk, args=(connection, listener), daemon=True).start()

    def talk(self, connection: socket.socket, listener: socket.socket) -> None:
        with connection, connection.makefile("rb") as lines:
            hello = lines.readline() if is_same_user(connection) else b""
            rank = json.loads(hello) if hello else None
            with self.lock:
                if rank not in self.not_connected:
                    return
                missed = self.not_connected.pop(rank)
                self.connected[rank] = connection
                if not self.not_connected:
                    listener.shutdown(socket.SHUT_RDWR)
                with contextlib.suppress(OSError):
                    descriptors = array.array("i", [self.memory])
                    connection.sendmsg([b"\n"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
                    connection.sendall(b"".join(missed))
            with contextlib.suppress(OSError):
                for line in lines:
                    self.messages.put(json.loads(line))
            with self.lock:
                del self.connected[rank]
        self.messages.put([rank, None])


def is_same_user(connection: socket.socket) -> bool:
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return user == os.getuid()
