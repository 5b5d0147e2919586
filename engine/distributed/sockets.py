"""Sockets that forked children must not keep: a loader worker would hold a dead rank's connections open.

The others then do not notice that the rank is gone, until its idle workers look for their parent, seconds later.
"""

import contextlib
import os
import socket
import stat
from collections.abc import Iterator

# Descriptor and inode of each socket: the number may belong to another file by the time of a fork. Written by the
# threads that open stores and groups, each with one operation that no other thread can interrupt; read in a child,
# which has no other thread.
_sockets: set[tuple[int, int]] = set()
# Ports of the stores that this process hosts: clients connect to them at any time.
_hosted: set[int] = set()


@contextlib.contextmanager
def closed_in_children() -> Iterator[None]:
    """Close in forked children the TCP sockets that are opened in this block. Any thread.

    A socket that another thread opens meanwhile is closed in children, too.
    """
    before = _tcp_sockets()
    try:
        yield
    finally:
        _sockets.update(_tcp_sockets() - before)


def close_hosted_in_children(port: int) -> None:
    """Close in forked children the sockets of a store that this process hosts, and of its clients. Any thread."""
    _hosted.add(port)


def _tcp_sockets() -> set[tuple[int, int]]:
    return {(number, inode) for number, inode, _ in _open_sockets()}


def _open_sockets() -> Iterator[tuple[int, int, int]]:
    """Yield descriptor, inode and local port of each TCP socket."""
    for name in os.listdir("/dev/fd"):
        number = int(name)
        # The list's own descriptor is closed by now, and other threads close theirs
        with contextlib.suppress(OSError):
            status = os.fstat(number)
            if not stat.S_ISSOCK(status.st_mode):
                continue
            view = socket.socket(fileno=number)
            try:
                if view.family in (socket.AF_INET, socket.AF_INET6) and view.type == socket.SOCK_STREAM:
                    yield number, status.st_ino, view.getsockname()[1]
            finally:
                view.detach()


def _close_in_child() -> None:
    if not _sockets and not _hosted:
        return
    # The number stays taken: an object in the child that still has it closes nothing else
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for number, inode, port in list(_open_sockets()):
        if (number, inode) in _sockets or port in _hosted:
            os.dup2(nothing, number, inheritable=False)
    os.close(nothing)
    _sockets.clear()
    _hosted.clear()


os.register_at_fork(after_in_child=_close_in_child)
