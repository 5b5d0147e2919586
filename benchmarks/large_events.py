"""What do 400 events of 1 MB cost the training process, and does a new viewer still see the status at once?

A process trains, writes its event log, shows the live page, and publishes an event of 1 MB from each of 400 steps.
Two viewers in this process read along, one who may steer and one who may not. Then new viewers come, one after the
other, while the page still has all that it keeps: noted is the time from the handshake to the first status, and to
the last milestone.

    python benchmarks/large_events.py [--quick] [--json FILE]
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from measure import Report, clock, parse, quantile
from page_link import link_to
from websockets.exceptions import ConnectionClosed

from offloop.dashboard import Dashboard
from offloop.engine import Event
from offloop.engine.testing import EndlessLoader, tiny_trainer

EVENTS, BYTES = 400, 1_000_000
PAUSE = 0.01  # seconds between two events
HI = '{"type":"hi","protocol":1}'
MOST_MB, MOST_SECONDS = 200, 1.0


class Large(Event, frozen=True, kw_only=True):
    """Text of a megabyte."""

    text: str


# The training process -----------------------------------------------------------------------------


def memory(field: str) -> float:
    """Return a figure of this process from the system, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise LookupError(field)


def say(**figures: Any) -> None:
    print(json.dumps(figures), flush=True)


def train(events: int) -> None:
    """Train and publish; waits for a line before the first event, and again before the end."""
    with tempfile.TemporaryDirectory() as place:
        trainer = tiny_trainer(run_dir=place)
        usual = trainer.training_step
        number = 0

        def training_step(batch: Any) -> torch.Tensor:
            nonlocal number
            number += 1
            if number > 100:
                trainer.publish(Large(text=chr(97 + number % 26) * BYTES))
                time.sleep(PAUSE)
            elif number == 100:
                Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
                say(resident=memory("VmRSS"))
                sys.stdin.readline()
            return usual(batch)

        trainer.training_step = training_step  # type: ignore[method-assign]  # the same for every run
        with Dashboard(port=0, quiet=True) as dashboard:
            say(url=dashboard.url, read_only_url=dashboard.read_only_url)
            trainer.train(EndlessLoader(), max_steps=100 + events, callbacks=[dashboard])
            say(resident=memory("VmRSS"), peak=memory("VmHWM"))
            sys.stdin.readline()


# The viewers --------------------------------------------------------------------------------------


def follow(address: str) -> None:
    """Read everything until the end."""
    with link_to(address) as link:
        link.send(HI)
        try:
            while True:
                link.recv()
        except ConnectionClosed:
            return


def open_page(address: str) -> tuple[float, float, int]:
    """Return the seconds to the first status and to the end of the run, and the number of large events that came."""
    started = clock()
    seen, large = 0.0, 0
    with link_to(address) as link:
        link.send(HI)
        while True:
            data = link.recv()
            if not isinstance(data, str):
                continue
            if data.startswith('{"type":"status"'):
                seen = seen or clock() - started
            elif 'Large","run_id"' in data[:300]:
                large += 1
            elif '"type":"TrainEnd"' in data[:300]:
                return seen, clock() - started, large


def measure(report: Report, viewers: int, events: int, opened: int) -> None:
    """Measure one run."""
    command = [sys.executable, __file__, "--train", str(events)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None and child.stdout is not None
        output = child.stdout

        def hear() -> Any:
            return json.loads(output.readline())

        addresses = hear()
        before = hear()["resident"]
        followers = [
            threading.Thread(target=follow, args=(addresses[name],))
            for name in ("url", "read_only_url")[:viewers]
        ]
        for each in followers:
            each.start()
        child.stdin.write("go\n")
        child.stdin.flush()
        after = hear()
        found = [open_page(addresses["url"]) for _ in range(opened)]
        child.stdin.write("end\n")
        child.stdin.flush()
        for each in followers:
            each.join()
    at_end, peak = after["resident"] - before, after["peak"] - before
    status, everything = ([each[place] for each in found] for place in (0, 1))
    report.row(viewers, "process larger at the end", f"{at_end:.0f} MB", f"<= {MOST_MB} MB")
    report.row(viewers, "... at its largest", f"{peak:.0f} MB", "")
    worst = f"p50 {quantile(status, 0.5) * 1e3:.0f} ms, worst {max(status) * 1e3:.0f} ms"
    report.row(viewers, "new viewer: to the first status", worst, f"<= {MOST_SECONDS:.0f} s")
    all_of_it = f"{quantile(everything, 0.5):.2f} s, {found[0][2]} events"
    report.row(viewers, "... to the last milestone", all_of_it, "")
    report.figure(f"{viewers} viewers", {"end": at_end, "peak": peak, "status": status, "all": everything})


def main() -> None:
    if sys.argv[1:2] == ["--train"]:
        # Without `parse`, which has the process keep freed memory.
        train(int(sys.argv[2]))
        return
    arguments = parse(__doc__)
    events = 40 if arguments.quick else EVENTS
    report = Report(
        f"{events} events of 1 MB, {PAUSE * 1e3:.0f} ms apart",
        ["viewers", "figure", "measured", "goal"],
        ["websockets"],
    )
    with report.measuring():
        for viewers in (0, 2):
            measure(report, viewers, events, 3 if arguments.quick else 10)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
