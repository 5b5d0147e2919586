"""Does memory stay flat over an hour of live page, with viewers that come and go?

A run in a process of its own takes about 50 steps a second of 20 ms, logs seven curves of its own, validates every
30 seconds, begins an epoch every two minutes and has its resources watched. A page stays open in Chromium all the
time. Beside it five viewers come and go: a tab of a telephone that is reloaded, and four websockets, which close
in order, drop the connection, or stop reading until the server cuts them off.

Each minute the run's process says what it takes, and the page is looked at after its garbage was collected:

    run, beside its history    resident memory of the run's process, less the bytes of the curves that it keeps
    browser's heap             of the page that stays: objects and what its arrays hold
    points of a curve          most that the page holds of any
    left behind                connections, threads and files in the run's process, once the five have gone

The first tenth is warm-up. After it a line is fitted; what it rises by is what has grown.

    python benchmarks/live_soak.py [--quick] [--minutes 60] [--json FILE]

Needs Debian's chromium and playwright (`pip install 'offloop[browser]'`). Takes a third of a core.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence

import psutil
import torch
from browser import chromium_of, cpu_of, heap_of
from live_page import follow, link_to
from measure import TINY, Batch, Report, clock, optimizer_of, parse
from memory import FLAT, resident
from playwright.async_api import Browser, Page, async_playwright
from websockets.exceptions import ConnectionClosed

from offloop.callbacks import ResourceMonitor
from offloop.dashboard import Dashboard
from offloop.engine import Trainer

STEP = 0.02  # seconds
STEPS_PER_EPOCH = 6_000
VALIDATE_EVERY = 1_500
WARM_UP = 0.1  # of the time
MOST_POINTS = 8_000
WEBSOCKETS = 4
STAY, AWAY = (5.0, 60.0), (2.0, 15.0)  # seconds, from and to


# The run: a process of its own --------------------------------------------------------------------


class Paced(Trainer):
    """Trains the tiny MLP, and sleeps for the rest of a step of 20 ms."""

    next_at = 0.0

    def training_step(self, batch: Batch) -> torch.Tensor:
        inputs, targets = batch
        outputs = self.model(inputs)
        loss = torch.nn.functional.cross_entropy(outputs, targets)
        self.log("accuracy", (outputs.argmax(dim=1) == targets).float().mean())
        for number in range(4):
            self.log(f"layer_{number}", math.sin(self.next_at / (5 + number)) + random.random() / 5)
        time.sleep(max(0.0, self.next_at - clock()))
        self.next_at = max(self.next_at + STEP, clock())
        return loss

    def validation_step(self, batch: Batch) -> torch.Tensor:
        inputs, targets = batch
        return torch.nn.functional.cross_entropy(self.model(inputs), targets)


class Epoch:
    """Gives the batches of an epoch, from memory."""

    def __init__(self) -> None:
        self._batches = TINY.batches()

    def __len__(self) -> int:
        return STEPS_PER_EPOCH

    def __iter__(self) -> Iterator[Batch]:
        return itertools.islice(itertools.cycle(self._batches), STEPS_PER_EPOCH)


def be_training() -> None:
    """Train, and say what the process takes for each line of standard input; stop at its end."""
    torch.set_num_threads(1)
    model = TINY.model()
    with Dashboard(port=0, quiet=True) as dashboard:
        trainer = Paced(
            model,
            optimizer_of(model),
            device="cpu",
            gradient_clip_val=1.0,
            val_every_n_steps=VALIDATE_EVERY,
            callbacks=[dashboard, ResourceMonitor()],
        )
        validate_on = TINY.batches()[:8]
        thread = threading.Thread(target=lambda: trainer.train(Epoch(), validate_on, max_steps=10**9))
        thread.start()
        print(dashboard.url, flush=True)
        for _ in sys.stdin:
            print(json.dumps(taken_by(dashboard, trainer)), flush=True)
        assert trainer.last_run is not None
        trainer.last_run.stop_nowait()
        thread.join()


def taken_by(dashboard: Dashboard, trainer: Trainer) -> dict[str, float]:
    """Return what this process takes: megabytes, and numbers."""
    server = dashboard._server
    assert server is not None and trainer.last_run is not None
    (live,) = server.hub.runs.values()
    return {
        "steps": trainer.last_run.step,
        "resident": resident(),
        "history": live.history.bytes / 1e6,
        "connections": len(server._requests.peers),
        "threads": threading.active_count(),
        "files": len(os.listdir("/proc/self/fd")),
    }


class Training:
    """The process of the run, seen from here."""

    def __init__(self) -> None:
        command = [sys.executable, __file__, "--be-training"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.url = self._read().strip()
        self.seen_from_outside = psutil.Process(self._process.pid)

    def _read(self) -> str:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return line
        raise SystemExit("the process of the run has ended")

    def ask(self) -> dict[str, float]:
        """Return what it takes. Waits for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        answer: dict[str, float] = json.loads(self._read())
        return answer

    def stop(self) -> None:
        """End the run, and wait for it."""
        self._process.communicate()


# Viewers that come and go -------------------------------------------------------------------------


async def come_and_go(address: str, chance: random.Random, leaves: dict[str, int]) -> None:
    """Be a websocket viewer again and again, and leave in one of three ways. Until it is cancelled."""
    counts = {"open": 0.0, "bytes": 0.0, "frames": 0.0, "gap": 0.0}
    while True:
        await asyncio.sleep(chance.uniform(*AWAY))
        way = chance.choice(("closes", "drops the connection", "stops reading"))
        with contextlib.suppress(ConnectionClosed):
            async with link_to(address) as link:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(chance.uniform(*STAY)):
                        await follow(link, counts)
                if way == "stops reading":
                    await asyncio.sleep(30)
                if way != "closes":
                    link.transport.abort()
        leaves[way] += 1


async def reload_and_go(
    browser: Browser, address: str, chance: random.Random, leaves: dict[str, int]
) -> None:
    """Be a tab that is opened, reloaded and closed again and again. Until it is cancelled."""
    while True:
        await asyncio.sleep(chance.uniform(*AWAY) * 2)  # it costs more than the other four
        context = await browser.new_context(viewport={"width": 390, "height": 844})
        try:
            page = await context.new_page()
            await page.goto(address)
            for _ in range(chance.randint(0, 3)):
                await asyncio.sleep(chance.uniform(3, 20))
                await page.reload()
                leaves["reloads"] += 1
            await asyncio.sleep(chance.uniform(3, 20))
        finally:
            await context.close()
        leaves["tab closes"] += 1


# The page that stays ------------------------------------------------------------------------------

LONGEST_CURVE = """function () {
  const lengths = this.flatMap((map) => [...map.values()])
    .filter((value) => value?.step instanceof Float64Array && typeof value.length === "number")
    .map((curve) => curve.length);
  return [lengths.length, Math.max(0, ...lengths)];
}"""


async def curves_of(page: Page) -> tuple[int, int]:
    """Return how many curves the page holds, and the points of the longest: found among all maps in its heap."""
    session = await page.context.new_cdp_session(page)
    maps = {"expression": "Map.prototype", "objectGroup": "look"}
    prototype = (await session.send("Runtime.evaluate", maps))["result"]["objectId"]
    asked = {"prototypeObjectId": prototype, "objectGroup": "look"}
    found = (await session.send("Runtime.queryObjects", asked))["objects"]["objectId"]
    call = {"functionDeclaration": LONGEST_CURVE, "objectId": found, "returnByValue": True}
    count, longest = (await session.send("Runtime.callFunctionOn", call))["result"]["value"]
    await session.send("Runtime.releaseObjectGroup", {"objectGroup": "look"})
    await session.detach()
    return count, longest


async def look_at(page: Page) -> dict[str, float]:
    """Return what the page holds."""
    count, longest = await curves_of(page)
    nodes = await page.evaluate("() => document.querySelectorAll('*').length")
    return {"heap": await heap_of(page), "curves": count, "points": longest, "elements": nodes}


# Everything ---------------------------------------------------------------------------------------


Sample = dict[str, float]


async def watch(minutes: float) -> tuple[list[Sample], Sample, Sample, dict[str, int]]:
    """Return what was seen each minute, before the five came and after they had gone, and how they left."""
    training = await asyncio.to_thread(Training)
    leaves = dict.fromkeys(("closes", "drops the connection", "stops reading", "reloads", "tab closes"), 0)
    samples: list[Sample] = []
    every = min(60.0, 6.0 * minutes)
    try:
        async with async_playwright() as playwright:
            browser = await playwright.chromium.launch(executable_path=chromium_of(), args=["--disable-gpu"])
            page = await browser.new_page(viewport={"width": 1024, "height": 640})
            await page.goto(training.url)
            await page.locator(".chart").first.wait_for()
            here = psutil.Process()
            started, used = clock(), cpu_of(here)

            async def sample() -> Sample:
                seen = await asyncio.to_thread(training.ask) | await look_at(page)
                seen |= {"minutes": (clock() - started) / 60, "beside": seen["resident"] - seen["history"]}
                print(json.dumps(seen), flush=True)
                return seen

            alone = await sample()
            async with asyncio.TaskGroup() as tasks:
                comers = [
                    tasks.create_task(come_and_go(training.url, random.Random(number), leaves))
                    for number in range(WEBSOCKETS)
                ]
                comers.append(
                    tasks.create_task(reload_and_go(browser, training.url, random.Random(WEBSOCKETS), leaves))
                )
                while clock() - started < 60 * minutes:
                    await asyncio.sleep(every)
                    samples.append(await sample())
                for comer in comers:
                    comer.cancel()
            await asyncio.sleep(2)  # the server has seen them go
            left = await sample()
            left["cores"] = (cpu_of(here) - used) / (clock() - started)
            await browser.close()
    finally:
        await asyncio.to_thread(training.stop)
    return samples, alone, left, leaves


def rise_of(samples: Sequence[Sample], name: str) -> tuple[float, float, float]:
    """Return where the fitted line begins, what it rises by, and how far the samples lie from it (1 sigma)."""
    times, values = ([each[of] for each in samples] for of in ("minutes", name))
    slope, intercept = statistics.linear_regression(times, values)
    off = [value - intercept - slope * at for at, value in zip(times, values, strict=True)]
    return intercept + slope * times[0], slope * (times[-1] - times[0]), statistics.pstdev(off)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--minutes", type=float, default=60.0, help="length of the run")


def main() -> None:
    """Measure and print."""
    arguments = parse(__doc__, add_arguments)
    minutes = 1.0 if arguments.quick else arguments.minutes
    report = Report(
        f"Memory over {minutes:g} minutes of live page, with five viewers that come and go",
        ["what", "after warm-up", "rise by linear fit", "goal"],
        ["websockets", "playwright"],
    )
    with report.measuring():
        samples, alone, left, leaves = asyncio.run(watch(minutes))
    settled = [each for each in samples if each["minutes"] >= WARM_UP * minutes]
    hours = f"{settled[-1]['minutes'] - settled[0]['minutes']:.0f} min"
    for what, name, unit, bound in (
        ("run, beside its history", "beside", "MB", FLAT),
        ("history", "history", "MB", None),
        ("browser's heap", "heap", "MB", FLAT),
        ("elements of the page", "elements", "", None),
    ):
        begin, rise, off = rise_of(settled, name)
        verdict = "-" if bound is None else f"<= {bound:g} {unit}: {'met' if rise <= bound else 'missed'}"
        report.row(what, f"{begin:.1f} {unit}", f"{rise:+.2f} {unit} (sigma {off:.2f}) in {hours}", verdict)
        report.figure(what, {"begin": begin, "rise": rise, "sigma": off})
    most = max(each["points"] for each in samples)
    verdict = "met" if most <= MOST_POINTS else "missed"
    report.row("points of a curve", "-", f"at most {most:.0f}", f"<= {MOST_POINTS}: {verdict}")
    for name in ("connections", "threads", "files"):
        between = [each[name] for each in samples]
        verdict = "met" if left[name] <= alone[name] else "missed"
        report.row(
            f"{name} left behind",
            f"{min(between):.0f} to {max(between):.0f}",
            f"{left[name]:.0f} at the end",
            f"<= {alone[name]:.0f}, before they came: {verdict}",
        )
    report.figure("samples", samples)
    report.figure("alone", alone)
    report.figure("left", left)
    report.figure("leaves", leaves)
    went = ", ".join(f"{name} {count}" for name, count in leaves.items())
    report.note(f"{left['steps']:.0f} steps, {left['curves']:.0f} curves on the page. Viewers: {went}.")
    report.note(f"All processes together took {left['cores']:.2f} of a core.")
    report.finish(arguments.json)


if __name__ == "__main__":
    if sys.argv[1:] == ["--be-training"]:
        be_training()
    else:
        with tempfile.TemporaryDirectory() as state:
            os.environ["XDG_STATE_HOME"] = (
                state  # the user's own key for cookies is none of a benchmark's business
            )
            main()
