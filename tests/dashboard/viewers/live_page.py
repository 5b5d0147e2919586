"""A run that a test moves step by step, its live page in a real browser, and where things are on that page."""

import contextlib
import itertools
import os
import queue
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from playwright.sync_api import Locator, Page, expect

from offloop.dashboard import Dashboard
from offloop.engine import Callback, EventsDropped, Run, Trainer

PATIENCE: Final = 30_000
"""Milliseconds for something to appear; a busy machine is slow, a broken page slower still."""

NEXT_FRAME: Final = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
"""Waits until the browser has drawn what has changed."""

OpenPage = Callable[..., Page]


class Puppet(Trainer):
    """A trainer whose every step is given by the test, from another thread."""

    def __init__(self, callbacks: list[Any], **knobs: Any) -> None:
        model = torch.nn.Linear(1, 1)
        super().__init__(model, torch.optim.SGD(model.parameters(), lr=0.1), callbacks=callbacks, **knobs)
        self.steps: queue.SimpleQueue[dict[str, float] | Exception] = queue.SimpleQueue()
        self.is_free = False  # True: the steps need nobody any more
        self.val_losses: Iterator[float] = itertools.repeat(0.25)
        self.before_validation_ends = threading.Event()
        self.before_epoch_ends = threading.Event()
        self.before_validation_ends.set()
        self.before_epoch_ends.set()

    def _loss(self, value: float) -> torch.Tensor:
        loss: torch.Tensor = self.model(torch.zeros(1, 1)).sum() * 0 + value
        return loss

    def training_step(self, batch: Any) -> torch.Tensor:
        values = {"loss": 0.0} if self.is_free else self.steps.get()
        if isinstance(values, Exception):
            raise values
        for name, value in values.items():
            if name != "loss":
                self.log(name, value)
        return self._loss(values.get("loss", 1.0))

    def validation_step(self, batch: Any) -> torch.Tensor:
        self.before_validation_ends.wait()
        return self._loss(next(self.val_losses))

    def train_epoch(self, loader: Any) -> None:
        for batch in self.batches(loader):
            self.train_batch(batch)
        self.before_epoch_ends.wait()


class Batches(torch.utils.data.IterableDataset[torch.Tensor]):
    """Endless, so that the test says when the run ends."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            yield torch.zeros(1, 1)


class Drops(Callback):
    """Tells when somebody has missed samples."""

    def __init__(self) -> None:
        self.seen = threading.Event()

    async def on_events_dropped(self, event: EventsDropped, run: Run) -> None:
        self.seen.set()


class Training:
    """A run in a thread, with the live page open."""

    def __init__(
        self,
        directory: Path | None = None,
        *,
        max_steps: int = 10**9,
        knobs: Mapping[str, Any] = MappingProxyType({}),
        callbacks: Sequence[Callback] = (),
        **options: Any,
    ) -> None:
        """Prepare a run.

        Args:
            directory: Where runs are kept; None for nowhere.
            max_steps: Where it ends by itself.
            knobs: Of the trainer.
            callbacks: Beside the live page.
            options: Of the live page.
        """
        self.dashboard = Dashboard(port=0, quiet=True, **options)
        where = {"run_dir": str(directory)} if directory is not None else {}
        self.drops = Drops()
        self.trainer = Puppet([self.dashboard, self.drops, *callbacks], **where, **knobs)
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._train, args=(max_steps,))

    def _train(self, max_steps: int) -> None:
        try:
            self.trainer.train(Batches(), [torch.zeros(1, 1)], max_steps=max_steps)
        except Exception as error:
            self.error = error

    def __enter__(self) -> "Training":
        self.dashboard.__enter__()
        return self

    def begin(self) -> "Training":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.free()
        if self._thread.ident is not None:
            with contextlib.suppress(Exception):
                self.run.stop_nowait("the test is over")
            self._thread.join()
        self.dashboard.__exit__(None, None, None)

    def free(self) -> None:
        """Let everything go on that waits for the test."""
        self.trainer.is_free = True
        self.trainer.before_validation_ends.set()
        self.trainer.before_epoch_ends.set()
        self.trainer.steps.put({})

    @property
    def run(self) -> Run:
        run = self.trainer.last_run
        assert run is not None
        return run

    @property
    def server(self) -> Any:
        return self.dashboard._server

    def step(self, **values: float) -> None:
        """Have the run do a step."""
        self.trainer.steps.put(values)

    def wait_for_end(self) -> None:
        self._thread.join()


def word(page: Page) -> Locator:
    """What the page calls the state of the run."""
    return page.locator(".pill .word")


def figure(page: Page, name: str) -> Locator:
    return page.locator(".figure", has=page.locator("dt", has_text=re.compile(f"^{name}$")))


def chart(page: Page, name: str) -> Locator:
    return page.get_by_role("figure", name=name, exact=True)


def options(page: Page, name: str) -> Locator:
    """Open the options of a chart."""
    chart(page, name).get_by_role("button", name=f"Options of {name}").click()
    opened = page.get_by_role("group", name=f"Options of {name}")
    expect(opened).to_be_visible()
    return opened


def button(page: Page, name: str) -> Locator:
    return page.get_by_role("group", name="Control of the run").get_by_role("button", name=name)


def acks(page: Page) -> Locator:
    return page.get_by_role("list", name="Commands")


def wait_until_accepted(page: Page) -> None:
    """Wait until the run has the command: the next step may be its boundary, and there is no other one."""
    expect(acks(page)).to_contain_text("accepted")


def give(page: Page, name: str) -> None:
    """Give a command by its button."""
    button(page, name).click()
    wait_until_accepted(page)


def look_at_the_network(page: Page) -> None:
    """Have a page see at once how it stands with its server, as when the machine was offline."""
    page.evaluate("() => { window.dispatchEvent(new Event('online')); }")


def table_of(page: Page, name: str) -> dict[str, list[str]]:
    """Return what the table of a chart shows: x -> values, as text."""
    chart(page, name).get_by_role("button", name=re.compile("table", re.IGNORECASE)).click()
    table = chart(page, name).get_by_role("table")
    expect(table).to_be_visible()
    rows: list[list[str]] = table.locator("tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
    )
    return {x: values for x, *values in rows}


def pixels(picture: Locator) -> list[Any]:
    """Read the pixels of a picture on the page back: rows of RGB."""
    expect(picture).to_be_visible()
    rows: list[Any] = picture.evaluate(
        """async (picture) => {
          await picture.decode();
          const canvas = document.createElement("canvas");
          const { naturalWidth: width, naturalHeight: height } = picture;
          Object.assign(canvas, { width, height });
          const pen = canvas.getContext("2d");
          pen.drawImage(picture, 0, 0);
          const { data } = pen.getImageData(0, 0, width, height);
          return Array.from({ length: height }, (_, y) =>
            Array.from({ length: width }, (_, x) => [...data.slice(4 * (y * width + x), 4 * (y * width + x) + 3)]));
        }"""
    )
    return rows


def shot(page: Page, name: str) -> None:
    """Take a picture of a state; something must be on it."""
    directory = os.environ.get("OFFLOOP_SCREENSHOTS")
    path = None if directory is None else Path(directory) / f"{name}.png"
    assert len(page.screenshot(path=path)) > 5_000
