"""The live page: what a run shows in a browser, and how it is steered from there.

Names are loaded when first used, because logging browsers out needs no torch.
"""

from typing import TYPE_CHECKING

from offloop.engine.lazy_facade import lazy_facade

if TYPE_CHECKING:
    from offloop.dashboard.callback import Dashboard as Dashboard
    from offloop.dashboard.client.curves import MetricCurve as MetricCurve
    from offloop.dashboard.client.watch import Watch as Watch
    from offloop.dashboard.client.watch import connect as connect
    from offloop.dashboard.saved.saved_page import SavedPage as SavedPage
    from offloop.dashboard.saved.saved_page import export_html as export_html

_NAMES = {
    "callback": "Dashboard",
    "client.curves": "MetricCurve",
    "client.watch": "Watch connect",
    "saved.saved_page": "SavedPage export_html",
}

__all__, __getattr__, __dir__ = lazy_facade(__name__, _NAMES)
