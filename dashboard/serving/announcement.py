"""Announcement: the address of a page, printed where it opens."""

import contextlib
import getpass
import logging
import os
import sys
import threading
import webbrowser

from offloop.dashboard.serving.security import is_loopback
from offloop.dashboard.serving.server import Server

logger = logging.getLogger("offloop")


def announce(server: Server, *, open_browser: bool, quiet: bool, without_encryption: str) -> None:
    """Print the address of a server that has just opened, with what its user should know.

    Args:
        server: The server.
        open_browser: Also open the page in the browser.
        quiet: Print no address.
        without_encryption: What to do about a server that others can reach without encryption.
    """
    host = server.options.host
    if not is_loopback(host) and server.options.ssl is None:
        logger.warning(
            "the live page listens on %s without encryption: anyone who can read the network traffic can read "
            "the token and steer the run; %s",
            host,
            without_encryption,
        )
    if server.page is None:
        logger.warning("the live page is not built: in a checkout run `make page`")
    if not quiet:
        say(f"Live page: {server.url}")
        if "SSH_CONNECTION" in os.environ and is_loopback(host):
            where = os.environ["SSH_CONNECTION"].split()
            machine = where[2] if len(where) > 2 else "this-machine"
            say(f"From your own machine: ssh -L {server.port}:127.0.0.1:{server.port} {_user()}@{machine}")
    if open_browser:
        # RuntimeError: no thread can be started. The address is printed all the same.
        with contextlib.suppress(RuntimeError):
            threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()


def say(text: str) -> None:
    """Print a line for the user."""
    print(text, file=sys.stderr, flush=True)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "you"
