"""How fast is the live page in a real browser, and what does the browser cost the machine that trains?

A run does about 100 steps a second and logs eight metrics, each in a panel of its own; Chromium shows all of them.

    event -> drawn      From the event in the training thread to the page's word that the frame with it is drawn, for
                        every event. The page gives it in the animation frame in which it has drawn; the picture
                        is on the screen with the next refresh, at most 17 ms later.
    browser's CPU       All of Chromium's processes, with 8 panels of 2,000 points and 10 frames a second.
    frame               From the start of an animation frame in which the page works to the moment when the browser
                        has laid out and painted and takes the next message; with as many points as asked for.
    frame, 10 runs      The same with ten live runs over each other, each with 2 steps a second.
    page current again  From the moment when a new server listens at the same port to the first frame drawn from it.
    heap                Of the page's JavaScript, after its garbage was collected, before and after the frames above.

    python benchmarks/browser.py [--quick] [--seconds 30] [--json FILE]

Needs Debian's chromium and playwright (`pip install 'offloop[browser]'`).
"""

import argparse
import asyncio
import contextlib
import itertools
import math
import os
import shutil
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import torch
from measure import Report, parse, quantile
from playwright.async_api import Page, async_playwright

from offloop.dashboard import Dashboard
from offloop.dashboard.viewers.run_cursor import RunCursor
from offloop.dashboard.viewers.viewer import Viewer
from offloop.engine import Run, Trainer

PANELS = 8
STEP = 0.01  # seconds between two steps
WATCH_FRAMES = """
window.frameTimes = [];
const plain = window.requestAnimationFrame.bind(window);
const channel = new MessageChannel();
let began = null, worked = false;
channel.port1.onmessage = () => {
  if (worked) window.frameTimes.push(performance.now() - began);
  began = null; worked = false;
};
window.requestAnimationFrame = (callback) => plain((time) => {
  if (began === null) { began = performance.now(); channel.port2.postMessage(0); }
  const before = performance.now();
  callback(time);
  if (performance.now() - before > 0.5) worked = true;
});
"""


class Paced(Trainer):
    """Logs eight metrics a step, at a pace; as fast as it can to fill the history."""

    fill_until = 0
    every = STEP

    def __init__(self, dashboard: Dashboard) -> None:
        model = torch.nn.Linear(1, 1)
        super().__init__(model, torch.optim.SGD(model.parameters(), lr=0.1), callbacks=[dashboard])
        self.next_at = 0.0
        self.filled = threading.Event()

    def training_step(self, batch: Any) -> torch.Tensor:
        assert self.last_run is not None
        step = self.last_run.step
        if step >= self.fill_until:
            self.filled.set()
            time.sleep(max(0.0, self.next_at - time.perf_counter()))
            self.next_at = time.perf_counter() + self.every
        for panel in range(PANELS - 2):  # loss and lr are the other two
            self.log(f"metric_{panel}", math.sin(step / (50 + 10 * panel)) + (step * 7919 % 100) / 500)
        return self.model(batch).sum() * 0 + math.exp(-step / 3000)


class Endless:
    def __iter__(self) -> Iterator[torch.Tensor]:
        return itertools.repeat(torch.zeros(1, 1))


class Watch:
    """Notes, for each chart frame, which events are in it and when the page said that it had drawn them."""

    def __init__(self) -> None:
        self.latencies: list[float] = []
        self.drawn = threading.Event()
        self.on = False
        self._times: dict[int, list[float]] = {}
        make, drawn = RunCursor._delta, Viewer.drawn

        def _delta(cursor: RunCursor) -> bytes | None:
            first = cursor._row
            frame = make(cursor)
            if frame is not None and self.on:
                axis = cursor.live.history.axis
                start = max(0, first - axis._first)
                self._times[id(cursor)] = axis._dense["time"].read(start).tolist()
            return frame

        def _drawn(viewer: Viewer) -> None:
            now = time.time()
            for cursor in viewer._cursors.values():
                self.latencies += [now - each for each in self._times.pop(id(cursor), ())]
            drawn(viewer)
            self.drawn.set()

        RunCursor._delta, Viewer.drawn = _delta, _drawn  # type: ignore[method-assign]  # to look inside


class Training:
    """A run in a thread, shown at a port."""

    def __init__(self, port: int, fill: int, every: float = STEP) -> None:
        self.dashboard = Dashboard(port=port, quiet=True, token="0123456789abcdef")
        self.trainer = Paced(self.dashboard)
        self.trainer.fill_until, self.trainer.every = fill, every
        self.thread = threading.Thread(target=self._train)

    def _train(self) -> None:
        self.trainer.train(Endless(), max_steps=10**9)

    def __enter__(self) -> "Training":
        self.thread.start()
        self.trainer.filled.wait()
        return self

    def __exit__(self, *exception: object) -> None:
        self.run.stop_nowait()
        self.thread.join()

    @property
    def run(self) -> Run:
        assert self.trainer.last_run is not None
        return self.trainer.last_run


def cpu_of(process: psutil.Process) -> float:
    """Return the CPU seconds of a process and all below it."""
    total = 0.0
    for each in [process, *process.children(recursive=True)]:
        try:
            times = each.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


async def heap_of(page: Page) -> float:
    """Return megabytes of JavaScript's heap after a collection, with what its arrays hold beside it."""
    session = await page.context.new_cdp_session(page)
    await session.send("HeapProfiler.collectGarbage")
    used = await session.send("Runtime.getHeapUsage")
    await session.detach()
    return float(used["usedSize"] + used["backingStorageSize"]) / 1e6


def chromium_of() -> str:
    """Return where the browser is."""
    if found := shutil.which("chromium") or shutil.which("google-chrome"):
        return found
    raise SystemExit("this benchmark needs chromium: apt-get install chromium")


async def wait_for_points(page: Page) -> None:
    await page.locator(".chart").nth(PANELS - 1).wait_for()
    await asyncio.sleep(2)  # the first snapshots are drawn


async def measure(report: Report, seconds: float, chromium: str) -> None:
    watch = Watch()
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=["--disable-gpu"])
        me = psutil.Process(os.getpid())
        root = next(each for each in me.children(recursive=True) if "chromium" in " ".join(each.cmdline()))
        for points in (2_000, 20_000):
            with Training(0, points) as training:
                context = await browser.new_context(viewport={"width": 1600, "height": 1000})
                page = await context.new_page()
                await page.add_init_script(WATCH_FRAMES)
                await page.goto(training.dashboard.url)
                await wait_for_points(page)
                before = await heap_of(page)
                await page.evaluate("() => { window.frameTimes = []; }")
                watch.latencies.clear()
                watch.on = True
                used, started = cpu_of(root), time.perf_counter()
                await asyncio.sleep(seconds)
                share = (cpu_of(root) - used) / (time.perf_counter() - started)
                watch.on = False
                frames = [each / 1000 for each in await page.evaluate("() => window.frameTimes")]
                after = await heap_of(page)
                await context.close()
            name = f"{PANELS} panels x {points:,} points"
            for what, values, goal in (
                (
                    "event -> drawn",
                    watch.latencies,
                    "p50 <= 100 ms, p99 <= 200 ms" if points == 2_000 else "-",
                ),
                ("frame", frames, "p50 <= 33 ms" if points == 20_000 else "-"),
            ):
                p50, p99 = quantile(values, 0.5) * 1000, quantile(values, 0.99) * 1000
                report.row(f"{what}, {name}", f"p50 {p50:.0f} ms, p99 {p99:.0f} ms", len(values), goal)
                report.figure(f"{what}, {points}", {"p50": p50, "p99": p99, "n": len(values)})
            report.row(
                f"browser's CPU, {name}",
                f"{share:.1%} of a core",
                len(frames),
                "<= 20 %" if points == 2_000 else "-",
            )
            report.row(f"heap, {name}", f"{before:.1f} -> {after:.1f} MB", 1, "+ <= 5 MB")
            report.figure(f"cpu, {points}", share)
            report.figure(f"heap, {points}", [before, after])
        await measure_overlaid(report, browser, seconds)
        await measure_return(report, browser, watch)
        await browser.close()


async def measure_overlaid(report: Report, browser: Any, seconds: float, runs: int = 10) -> None:
    """Show several runs over each other."""
    with contextlib.ExitStack() as stack:
        trainings = [stack.enter_context(Training(0, 2_000, 0.5)) for _ in range(runs)]
        context = await browser.new_context(viewport={"width": 1600, "height": 1000})
        page = await context.new_page()
        await page.add_init_script(WATCH_FRAMES)
        await page.goto(trainings[0].dashboard.url)
        await wait_for_points(page)
        first, *others = [training.run.id for training in trainings]
        await page.evaluate(
            "view => { location.hash = view; }", f"#v=1&run={first}&with={'&with='.join(others)}"
        )
        legend = page.locator(".chart").first.locator(".curve")
        await legend.nth(runs - 1).wait_for()
        await asyncio.sleep(3)
        await page.evaluate("() => { window.frameTimes = []; }")
        await asyncio.sleep(seconds)
        frames = [each / 1000 for each in await page.evaluate("() => window.frameTimes")]
        await context.close()
    p50, p99 = quantile(frames, 0.5) * 1000, quantile(frames, 0.99) * 1000
    name = f"frame, {runs} runs x {PANELS} panels x 2,000 points"
    report.row(name, f"p50 {p50:.0f} ms, p99 {p99:.0f} ms", len(frames), "p50 <= 50 ms")
    report.figure(f"frame, {runs} runs", {"p50": p50, "p99": p99, "n": len(frames)})


async def measure_return(report: Report, browser: Any, watch: Watch, rounds: int = 5) -> None:
    """Close the server and open another at the same port, again and again, with a tab left open."""
    context = await browser.new_context(viewport={"width": 1600, "height": 1000})
    page = await context.new_page()
    port, seconds = 0, []
    for number in range(rounds + 1):
        training = await asyncio.to_thread(Training(port, 0).__enter__)
        listening = time.perf_counter()
        watch.drawn.clear()
        if number == 0:
            server = training.dashboard._server
            assert server is not None
            port = server.port
            await page.goto(training.dashboard.url)
            await asyncio.to_thread(watch.drawn.wait, 30)
        else:
            await asyncio.to_thread(watch.drawn.wait, 30)
            seconds.append(time.perf_counter() - listening)
        await asyncio.sleep(1)
        await asyncio.to_thread(training.__exit__)
        await asyncio.sleep(3)
    await context.close()
    p50, worst = quantile(seconds, 0.5), max(seconds)
    report.row("page current again", f"p50 {p50:.2f} s, worst {worst:.2f} s", len(seconds), "<= 0.5 s")
    report.figure("page current again", seconds)


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--seconds", type=float, default=30.0, help="length of each measured stretch")

    arguments = parse(__doc__, more)
    chromium = chromium_of()
    torch.set_num_threads(1)
    report = Report(
        "How fast is the live page in a browser?",
        ["what", "figure", "n", "goal"],
        ["websockets", "playwright"],
    )
    with report.measuring():
        asyncio.run(measure(report, 3.0 if arguments.quick else arguments.seconds, chromium))
    report.note("Chromium headless with software raster, on the machine that trains.")
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
