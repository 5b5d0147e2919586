"""Notebook: the live page in the output of a cell, and the picture that stays there when a run is over."""

import html
import os
import sys
from typing import Any, Final, cast

HEIGHT: Final = 600
HUB_PREFIX: Final = "JUPYTERHUB_SERVICE_PREFIX"
"""Variable of the environment in which JupyterHub tells a notebook server its path."""


def is_in_notebook() -> bool:
    """True where the output of a cell can show a page; false in a script, a terminal, or IPython's shell."""
    # No such function while another thread is importing IPython.
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", None)
    shell = None if get_ipython is None else get_ipython()
    return shell is not None and hasattr(shell, "kernel")


class CellOutput:
    """The output of the cell that showed the page. One thread at a time."""

    def __init__(self, address: str, embed: str, key: str, height: int) -> None:
        """Show the page.

        Args:
            address: Of the page, as the browser reaches it.
            embed: Lets the page be in a frame.
            key: Lets the page in.
            height: Of the frame, pixels.
        """
        from IPython.display import display

        self._frame = _frame(address, embed, key, height)
        self._is_frame = True
        self._handle: Any = cast(Any, display)(self._frame, raw=True, display_id=True)

    def show_frame(self) -> None:
        """Show the page, if a picture has taken its place."""
        if not self._is_frame:
            self._is_frame = True
            self._handle.update(self._frame, raw=True)

    def show_picture(self, picture: str, text: str) -> None:
        """Show a picture instead of the page.

        Args:
            picture: As SVG.
            text: What to say where no picture can be seen.
        """
        self._is_frame = False
        self._handle.update({"image/svg+xml": picture, "text/plain": text}, raw=True)


def address_in_browser(port: int, address: str) -> str:
    """Return the address at which the browser finds the page of a kernel: through jupyter-server-proxy on a hub."""
    prefix = os.environ.get(HUB_PREFIX)
    return address if not prefix else f"{prefix.rstrip('/')}/proxy/{port}/"


def _frame(address: str, embed: str, key: str, height: int) -> dict[str, str]:
    frame, page, shown = (
        html.escape(each) for each in (f"{address}?embed={embed}#key={key}", f"{address}#key={key}", address)
    )
    return {
        "text/html": (
            f'<iframe src="{frame}" title="Live page" width="100%" height="{height}" '
            'style="border:1px solid #d1d5db;border-radius:6px"></iframe>'
            f'<div style="font-size:12px">Live page: <a href="{page}" target="_blank" rel="noopener">{shown}</a>. '
            "If the frame stays empty, the browser does not reach this address: where the kernel runs on another "
            "machine, forward the port (<code>ssh -L</code>) or use jupyter-server-proxy.</div>"
        ),
        "text/plain": f"Live page: {address}",
    }
