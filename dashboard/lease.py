"""One server for all runs of a process, and the leases that keep it open.

Two servers would mean two browser tabs for one training. So the first lease opens the server, later ones share it,
and releasing the last one closes it.
"""

import threading

from offloop.dashboard.options import Options
from offloop.dashboard.serving.server import Server


class Lease:
    """The right to use a server until `release`. Any thread may call its methods."""

    def __init__(self, shared: "SharedServer", server: Server, *, is_first: bool) -> None:
        """Describe a lease. Only `SharedServer.acquire` makes one."""
        self.server = server
        self.is_first = is_first
        """True if this lease opened the server."""
        self._shared = shared

    def release(self, reason: str) -> None:
        """Give the lease back; the last one closes the server. Twice is fine.

        Blocks its thread for at most about three seconds, until the viewers have received `reason`.
        """
        if self._shared.remove(self):
            self.server.close(reason)

    def pin(self) -> bool:
        """Keep the server open after its last lease, until `unpin`; return False if it was pinned already."""
        return self._shared.set_pinned(self, True)

    def unpin(self) -> None:
        """Let the last lease close the server again, whichever lease pinned it."""
        self._shared.set_pinned(self, False)


class SharedServer:
    """Holder of the server. Threads that start and end runs call it, none of them the server's own."""

    def __init__(self) -> None:
        # Guards the attributes below: a server is opened, joined and given up by one thread at a time.
        self._lock = threading.Lock()
        self._server: Server | None = None
        # Leases of `_server` only.
        self._leases: set[Lease] = set()
        self._is_pinned = False
        # Settings of the page that an application serves.
        self._mounted: Options | None = None

    def mount(self, options: Options) -> None:
        """From now on, runs with default settings show themselves in the application's page.

        Raises:
            ValueError: A page is open at a port, or mounted with other settings.
        """
        with self._lock:
            if self._mounted not in (None, options):
                raise ValueError(
                    "the live page is mounted with other settings: one server serves all runs of a process, so give "
                    "each Dashboard that calls asgi() the same settings"
                )
            server = self._server
            if server is not None and server.is_serving and not server.options.is_mounted:
                raise ValueError(
                    f"the live page is open at port {server.port}: call asgi() before the first run begins"
                )
            self._mounted = options

    def acquire(self, options: Options) -> Lease:
        """Lease the server that is open, or open one with `options`. Blocks for milliseconds.

        Raises:
            OSError: The server cannot listen on the address.
            ValueError: The open server has other settings, and `options` are not the defaults.
        """
        with self._lock:
            if self._mounted is not None and options == Options():
                options = self._mounted
            server = self._server
            is_first = server is None or not server.is_serving
            if server is None or is_first:
                server = Server(options)
                # A server that Ctrl-C closed may have left leases: releasing them does nothing from here on.
                self._server, self._leases = server, set()
                # A page that an application serves is there between runs, too.
                self._is_pinned = options.is_mounted
            elif options not in (Options(), server.options):
                which = (
                    "mounted in this application" if server.options.is_mounted else f"at port {server.port}"
                )
                raise ValueError(
                    f"one server serves all runs of a process, and the one {which} has other settings: give the same "
                    "settings, or none"
                )
            lease = Lease(self, server, is_first=is_first)
            self._leases.add(lease)
            return lease

    def remove(self, lease: Lease) -> bool:
        """Forget a lease; return True if the caller must close its server."""
        with self._lock:
            if lease not in self._leases:
                return False
            self._leases.remove(lease)
            if self._leases or self._is_pinned:
                return False
            self._server = None
            return True

    def set_pinned(self, lease: Lease, pinned: bool) -> bool:
        """Pin or unpin the server of a lease; return whether that changed anything."""
        with self._lock:
            if lease not in self._leases or self._is_pinned is pinned or lease.server.options.is_mounted:
                return False
            self._is_pinned = pinned
            return True
