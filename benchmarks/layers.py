"""How fast does the page show the layers of a large model?

A run of a model of 500 parameters measures weights, gradients and activations 200 times, with 32 bins, and then waits.
Chromium has its page open at the metrics.

    tab opened      From the click on the tab until both heatmaps are on the screen: one statistic of all layers and the
                    histograms of one. Nothing of the layers was sent before.
    other layer     From the click on a layer until its heatmap is there.
    other kind      From the click on gradients or weights until both heatmaps of it are there.
    other statistic From the choice of another statistic until the heatmap of all layers is there.
    event taken in  What the thread of the page's server does for one event about 500 layers.

The end of each is the first message that the browser takes after the frame with the pictures.

    python benchmarks/layers.py [--quick] [--json FILE]

Needs Debian's chromium and playwright (`pip install 'offloop[browser]'`).
"""

import asyncio
import threading
import time
from typing import Any

import torch
from browser import chromium_of
from measure import Report, parse, quantile
from playwright.async_api import Page, async_playwright

from offloop.callbacks import GradientMonitor, LayersMeasured, LayerStatistics
from offloop.dashboard import Dashboard
from offloop.dashboard.curves.layer_history import LayerHistory, figures_of
from offloop.engine import Callback, Run, StepPoint, Trainer, in_step

LAYERS, MEASUREMENTS = 500, 200
WAIT = """
([pattern, pictures, act]) => new Promise((resolve) => {
  const canvases = () => [...document.querySelectorAll('.layer-plot canvas')].slice(0, 2);
  const isShown = (each) => new RegExp(pattern).test(each.getAttribute('aria-label') ?? '');
  const fits = () => canvases().filter(isShown).length;
  let done = false;
  const look = () => {
    if (done || fits() < pictures) return;
    done = true;
    const channel = new MessageChannel();
    channel.port1.onmessage = () => resolve(performance.now() - began);
    requestAnimationFrame(() => channel.port2.postMessage(0));
  };
  new MutationObserver(look).observe(document.body, {subtree: true, attributes: true, childList: true});
  const began = performance.now();
  eval(act);
  look();
})
"""


class Keep(Callback):
    """Keeps the last event about weights, and stops the run's steps once there are enough measurements."""

    def __init__(self) -> None:
        self.is_full, self.go_on = threading.Event(), threading.Event()
        self.event: LayersMeasured | None = None

    async def on_layers_measured(self, event: LayersMeasured, run: Run) -> None:
        if event.kind == "weights":
            self.event = event

    @in_step
    def after_step(self, point: StepPoint) -> None:
        if point.step >= MEASUREMENTS:
            self.is_full.set()
            self.go_on.wait()


class Deep(torch.nn.Module):
    """Residual layers in blocks of five, each with a weight and a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(
            torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(5)) for _ in range(LAYERS // 10)
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            assert isinstance(block, torch.nn.ModuleList)
            for layer in block:
                inputs = inputs + 0.05 * torch.relu(layer(inputs))
        return inputs


async def timed(page: Page, pattern: str, pictures: int, act: str) -> float:
    """Do something on the page and return the seconds until so many pictures fit the pattern."""
    return float(await page.evaluate(WAIT, [pattern, pictures, act])) / 1000


async def measure(report: Report, url: str, rounds: int) -> None:
    figures: dict[str, list[float]] = {}

    def note(what: str, seconds: float) -> None:
        figures.setdefault(what, []).append(seconds)

    def choose(name: str) -> str:
        return f"document.querySelector('[data-name=\"{name}\"]').click()"

    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium_of(), args=["--disable-gpu"])
        for _ in range(rounds):
            context = await browser.new_context(viewport={"width": 1600, "height": 1000})
            page = await context.new_page()
            await page.goto(url)
            await page.locator("#tab-layers:not([hidden])").wait_for()
            await asyncio.sleep(2)  # the curves are drawn
            note(
                "tab opened",
                await timed(page, "Heatmap of", 2, "document.querySelector('#tab-layers').click()"),
            )
            rows = await page.get_by_role("treeitem").count()
            assert rows >= LAYERS, rows
            assert "200 histograms" in str(
                await page.locator(".layer-plot canvas").nth(1).get_attribute("aria-label")
            )
            for number in range(1, 4):
                name = f"blocks.{number}.2.weight"
                note("other layer", await timed(page, name, 1, choose(name)))
            for kind in ("gradients", "weights"):
                act = f"document.querySelector('[data-kind={kind}]').click()"
                note("other kind", await timed(page, f"of the {kind}", 2, act))
            for statistic, word in (("std", "standard deviation"), ("update_ratio", "update ratio")):
                act = (
                    "const chosen = document.querySelector('.layer-picture select');"
                    f"chosen.value = '{statistic}'; chosen.dispatchEvent(new Event('change'))"
                )
                note("other statistic", await timed(page, f"Heatmap of the {word}", 1, act))
            await context.close()
        await browser.close()
    for what, values in figures.items():
        report.row(
            what,
            f"p50 {quantile(values, 0.5) * 1000:.0f} ms, worst {max(values) * 1000:.0f} ms",
            len(values),
            "<= 300 ms",
        )
        report.figure(what, values)


def measure_events(report: Report, event: LayersMeasured, rounds: int) -> None:
    history, values = LayerHistory(), []
    fields: dict[str, Any] = {name: getattr(event, name) for name in event.__struct_fields__}
    for step in range(rounds):
        began = time.perf_counter()
        history.add(step, figures_of("LayersMeasured", fields))
        values.append(time.perf_counter() - began)
    report.row("event taken in", f"p50 {quantile(values, 0.5) * 1000:.1f} ms", len(values), "-")
    report.figure("event taken in", values)


def main() -> None:
    arguments = parse(__doc__)
    torch.set_num_threads(1)
    report = Report(
        f"How fast does the page show {LAYERS} layers x {MEASUREMENTS} histograms?",
        ["what", "figure", "n", "goal"],
        ["websockets", "playwright"],
    )
    keep, dashboard, model = Keep(), Dashboard(port=0, quiet=True), Deep()
    monitors = [GradientMonitor(every_n_steps=1), LayerStatistics(every_n_steps=1)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trainer = Trainer(
        model, optimizer, loss=torch.nn.functional.mse_loss, callbacks=[dashboard, *monitors, keep]
    )
    batches = [(torch.randn(8, 32), torch.randn(8, 32))] * (MEASUREMENTS + 1)
    thread = threading.Thread(target=lambda: trainer.train(batches, epochs=1))
    with dashboard:
        thread.start()
        keep.is_full.wait()
        time.sleep(2)  # the page's server has the last events
        with report.measuring():
            asyncio.run(measure(report, dashboard.url, 2 if arguments.quick else 10))
            assert keep.event is not None
            measure_events(report, keep.event, 50)
        keep.go_on.set()
        thread.join()
    report.note("Chromium headless with software raster, on the machine that trains.")
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
