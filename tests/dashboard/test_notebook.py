"""dashboard/notebook.py in a real kernel: the page in a cell while it runs, and a picture in the saved notebook."""

import re
from typing import Final
from xml.etree import ElementTree

import numpy as np
import pytest
from fake_run import FakeRun, source_of
from notebook import SETUP, TRAIN, Notebook, html_of

from offloop.dashboard import Dashboard
from offloop.dashboard.curves.picture import picture
from offloop.dashboard.notebook import address_in_browser
from offloop.dashboard.runs.live_run import LiveRun
from offloop.engine import StepEnd, TrainStart

START: Final = TrainStart(run_id="run", step=0, epoch=0, time=1.0)


def step_end(step: int, loss: float) -> StepEnd:
    return StepEnd(run_id="run", step=step, epoch=0, time=1.0 + step, loss=loss, lr=0.1)


@pytest.mark.slow  # a kernel that imports torch
@pytest.mark.parametrize("line", ["dashboard", "dashboard.show(height=400)"])
def test_a_saved_notebook_has_a_picture_of_the_curves(notebook: Notebook, line: str) -> None:
    notebook.run(SETUP)
    (shown,) = notebook.run(line)
    assert f'height="{400 if "400" in line else 600}"' in html_of(shown)
    assert re.search(r'src="http://127\.0\.0\.1:\d+/\?embed=[0-9a-f]{32}#key=[0-9a-f]{32}"', html_of(shown))
    notebook.run(TRAIN)
    cell = notebook.save().cells[1]
    (kept,) = cell["outputs"]
    assert "text/html" not in kept["data"]
    root = ElementTree.fromstring(kept["data"]["image/svg+xml"])
    texts = [each.text for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert str(texts[0]).endswith(": completed") and "loss" in texts and "step 24" in texts
    assert not list(root.iter("{http://www.w3.org/2000/svg}script"))
    # The next run is live again, and its picture takes the place of the first.
    notebook.run("before = result.run_id\n" + TRAIN)
    (kept,) = notebook.save().cells[1]["outputs"]
    (said,) = notebook.run("print(before, result.run_id)")
    before, after = said["text"].split()
    assert after in kept["data"]["image/svg+xml"] and before not in kept["data"]["image/svg+xml"]


def test_elsewhere_it_says_what_to_do_instead() -> None:
    with pytest.raises(RuntimeError, match=r"show\(\) is for notebooks; elsewhere, Dashboard\(open=True\)"):
        Dashboard().show()
    with pytest.raises(ValueError, match="height must"):
        Dashboard().show(height=0)


def test_on_a_hub_the_page_is_behind_its_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert address_in_browser(8321, "http://127.0.0.1:8321/") == "http://127.0.0.1:8321/"
    monkeypatch.setenv("JUPYTERHUB_SERVICE_PREFIX", "/user/me/")
    assert address_in_browser(8321, "http://127.0.0.1:8321/") == "/user/me/proxy/8321/"


def test_the_picture_says_what_the_curves_do() -> None:
    live = LiveRun(source_of(FakeRun()), START)
    losses = [2.0, 1.0, float("nan"), 0.5]
    live.take_in([step_end(step, loss) for step, loss in enumerate(losses, 1)])
    drawn = picture(live.history, live.series, "a <b> & c")
    root = ElementTree.fromstring(drawn)
    texts = [str(each.text) for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0] == "a <b> & c" and "step 0.5" in texts and {"2", "0.5", "1.25"} <= set(texts)
    paths = [
        each.get("d") or "" for each in root.iter("{http://www.w3.org/2000/svg}path") if each.get("fill")
    ]
    # A gap where the loss is not finite
    assert paths[0].count("M") == 2
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", paths[0])]
    assert np.allclose(
        np.diff(heights), [(heights[2] - heights[0]) * 2 / 3, (heights[2] - heights[0]) / 3], atol=0.2
    )


def test_a_run_without_curves_has_an_empty_picture() -> None:
    live = LiveRun(source_of(FakeRun()), START)
    assert ElementTree.fromstring(picture(live.history, live.series, "nothing")) is not None
