"""`offloop verify-resume`: does a script that is killed and resumed make the same bits as one that is not?

The script runs once uninterrupted and once with `kill -9` at random points, resumed after each. What every step
saw and made is compared: the data, the states of the random generators, the loss; at the end the whole state.
"""

import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
from rich.console import Console
from rich.table import Table

from offloop.engine import OffloopError

EQUAL, DIFFERENT, UNUSABLE = 0, 1, 2
"""Exit codes."""

AFTER_SAVE: Final = 0.7
"""Share of the kills that wait for the checkpoint before them; the others may come while it is written."""
LONGEST_DELAY: Final = 5.0
"""Seconds; of steps that take longer than that, one more is enough."""
OUTPUT_LINES: Final = 15
"""So much of what a script that failed has printed is shown."""

Position = tuple[int, int]
"""Which of the script's runs, and the step in it."""


class UnusableError(OffloopError):
    """The script cannot be verified: the text says why."""


class Kill(msgspec.Struct, frozen=True):
    """When an attempt is to die."""

    run: int
    """Which of the script's runs, from 0."""
    step: int
    """A checkpoint is taken after this one."""
    after_save: bool
    """Wait until that checkpoint is durable; else the kill may come in the middle of writing it."""
    delay: float
    """Seconds after that."""
    last: int
    """The run's last step: it dies there if it has not before, so that something is left to resume."""


class Attempt(msgspec.Struct, frozen=True):
    """One execution of the script."""

    script: str
    arguments: list[str]
    runs: str
    """Directory for its runs."""
    record: str
    """File for what it saw."""
    output: str
    """File for what it prints."""
    kill: Kill | None


@dataclass
class Record:
    """What an attempt has written down."""

    code: int
    """Its exit code, or minus the signal that ended it."""
    output: str
    runs: list[dict[str, Any]] = field(default_factory=list)
    starts: dict[int, dict[str, Any]] = field(default_factory=dict)
    resumed: dict[int, dict[str, Any]] = field(default_factory=dict)
    steps: dict[Position, dict[str, Any]] = field(default_factory=dict)
    ends: dict[int, dict[str, Any]] = field(default_factory=dict)
    failed_saves: list[str] = field(default_factory=list)

    @property
    def resumed_at(self) -> list[int]:
        """The steps at which its runs went on from a checkpoint."""
        return [start["step"] for start in self.starts.values() if start["resumed"]]

    @property
    def was_killed(self) -> bool:
        """True if it died of our kill."""
        return self.code == -signal.SIGKILL


@dataclass(frozen=True)
class Difference:
    """The first difference of one kind."""

    kind: str
    """`first weights`, `data`, `random numbers`, `losses`, `number of steps` or `final state`."""
    attempt: int
    run: int
    step: int
    detail: str
    parts: tuple[str, ...] = ()
    """Which generators, which tensors of a batch, which parts of the state."""


@dataclass(frozen=True)
class Verdict:
    """What came of a verification."""

    reference: Record
    attempts: list[Record]
    differences: list[Difference]
    causes: list[str]

    @property
    def code(self) -> int:
        """Exit code; that nothing was resumed is not the same as that it went well."""
        was_resumed = any(attempt.resumed_at for attempt in self.attempts)
        failed = self.attempts[-1].code or any(attempt.failed_saves for attempt in self.attempts)
        return DIFFERENT if self.differences or failed or not was_resumed else EQUAL


class Nursery:
    """A process that has imported torch and forks for each attempt; blocks while one runs."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "offloop.cli.resume_probe"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Nursery":
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()

    def run(self, attempt: Attempt) -> Record:
        """Run the script once, to its end or to its kill."""
        assert self._process.stdin is not None
        print(msgspec.json.encode(attempt).decode(), file=self._process.stdin, flush=True)
        child = self._answer()["pid"]
        try:
            code = self._answer()["code"]
        except BaseException:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            raise
        return read_record(attempt, code)

    def _answer(self) -> dict[str, int]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise UnusableError("the process that runs the script could not be started")
        answer: dict[str, int] = json.loads(line)
        return answer


def read_record(attempt: Attempt, code: int) -> Record:
    """Read what an attempt has written down."""
    record = Record(code, Path(attempt.output).read_text(errors="replace"))
    path = Path(attempt.record)
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # the kill came in the middle of it
        kind, run = entry["kind"], entry["run"]
        if kind == "run":
            record.runs.append(entry)
        elif kind == "start":
            record.starts[run] = entry
        elif kind == "resumed":
            record.resumed[run] = entry
        elif kind == "step":
            record.steps[run, entry["step"]] = entry
        elif kind == "end":
            record.ends[run] = entry
        else:
            record.failed_saves.append(entry["error"])
    return record


# Verifying -----------------------------------------------------------------------------------------


def verify(
    script: Path, arguments: Sequence[str], *, kills: int, seed: int, directory: Path, nursery: Nursery
) -> Verdict:
    """Run the script uninterrupted, then killed and resumed, and compare. Blocks.

    Args:
        script: Trains with offloop when it is run.
        arguments: Its command line.
        kills: How many times it is killed, at least 1.
        seed: Decides where.
        directory: For runs and records; empty.
        nursery: Where the script runs.

    Raises:
        UnusableError: The script fails by itself, or does nothing that could be resumed.
    """

    def attempt(name: str, runs: str, kill: Kill | None) -> Record:
        return nursery.run(
            Attempt(
                str(script),
                list(arguments),
                str(directory / runs),
                str(directory / f"{name}.jsonl"),
                str(directory / f"{name}.txt"),
                kill,
            )
        )

    reference = attempt("uninterrupted", "uninterrupted", None)
    check_usable(reference)
    attempts: list[Record] = []
    for number, kill in enumerate(choose_kills(reference, kills, seed)):
        attempts.append(attempt(f"attempt-{number}", "killed", kill))
        if not attempts[-1].was_killed:
            break  # it came to its end before, or failed
    if attempts[-1].was_killed:
        attempts.append(attempt(f"attempt-{len(attempts)}", "killed", None))
    differences = list(compare(reference, attempts))
    return Verdict(reference, attempts, differences, explain(reference, attempts, differences))


def check_usable(reference: Record) -> None:
    """Raise unless the uninterrupted script has done something that can be verified."""
    if reference.code != 0:
        raise UnusableError(
            f"the script fails by itself, with exit code {reference.code}:\n{tail(reference.output)}"
        )
    if not reference.runs:
        raise UnusableError("the script starts no training with offloop: no Trainer.train() was called")
    if len(reference.steps) < len(reference.ends) + 1:
        raise UnusableError(
            "there is no step to be killed after: the script must train for two steps or more"
        )


def choose_kills(reference: Record, kills: int, seed: int) -> list[Kill]:
    """Choose where to kill: anywhere but after the last step of a run."""
    source = random.Random(seed)
    last = {run: max(step for other, step in reference.steps if other == run) for run, _ in reference.steps}
    places = sorted(place for place in reference.steps if place[1] < last[place[0]])
    chosen = sorted(source.sample(places, min(kills, len(places))))
    times = [entry["time"] for entry in reference.steps.values()]
    step_time = statistics.median([later - earlier for earlier, later in itertools.pairwise(times)] or [0.0])
    return [
        Kill(
            run,
            step,
            after_save=number == 0 or source.random() < AFTER_SAVE,  # the first: or nothing might be resumed
            delay=min(LONGEST_DELAY, source.uniform(0, 3 * step_time)),
            last=last[run],
        )
        for number, (run, step) in enumerate(chosen)
    ]


def compare(reference: Record, attempts: Sequence[Record]) -> Iterator[Difference]:
    """Give the first difference of each kind."""
    found: set[str] = set()

    def first(kind: str, *rest: Any) -> Iterator[Difference]:
        if kind not in found:
            found.add(kind)
            yield Difference(kind, *rest)

    for number, attempt in enumerate(attempts):
        for run, start in attempt.starts.items():
            other = reference.starts.get(run)
            if other is not None and not start["resumed"]:
                parts = differing(other["model"], start["model"])
                if parts:
                    yield from first("first weights", number, run, 0, shown(parts), parts)
        for (run, step), entry in sorted(attempt.steps.items()):
            place = (number, run, step)
            other = reference.steps.get((run, step))
            if other is None:
                yield from first("number of steps", *place, "more than without the interruption")
                continue
            if entry["data"] != other["data"]:
                parts = differing(merged(other["data"]), merged(entry["data"]))
                names = [f"batch.{part}" if part else "batch" for part in parts]
                yield from first("data", *place, f"in {shown(names)}", parts)
            parts = tuple(
                part
                for part in differing(other["random"], entry["random"])
                if part not in without_seed(reference, attempts, run)
            )
            if parts:
                yield from first("random numbers", *place, f"of {shown(parts)}", parts)
            if entry["loss"] != other["loss"]:
                losses = [repr(float.fromhex(each["loss"])) for each in (other, entry) if each["loss"]]
                yield from first("losses", *place, " / ".join(losses))
    number, attempt = len(attempts) - 1, attempts[-1]
    for run, end in attempt.ends.items():
        wanted = max((step for other, step in reference.steps if other == run), default=0)
        made = max((step for other, step in attempt.steps if other == run), default=wanted)
        if made != wanted:
            yield from first("number of steps", number, run, min(made, wanted), f"{wanted} / {made}")
        parts = differing(reference.ends[run]["state"], end["state"])
        if parts:
            yield from first("final state", number, run, made, shown(parts), parts)


def without_seed(reference: Record, attempts: Sequence[Record], run: int) -> tuple[str, ...]:
    """Return the generators that no two executions of the script begin with alike; it may not use them at all."""
    begun = [attempt.starts[run] for attempt in attempts if run in attempt.starts]
    return tuple(
        part
        for start in begun
        if not start["resumed"]
        for part in differing(reference.starts[run]["random"], start["random"])
    )


def merged(batches: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return the digests of a step's batches as one, by path in a batch."""
    together: dict[str, str] = {}
    for batch in batches:
        for path, value in batch.items():
            together[path] = together.get(path, "") + value
    return together


def differing(one: Mapping[str, str], other: Mapping[str, str]) -> tuple[str, ...]:
    """Return the keys whose values differ."""
    return tuple(key for key in {**one, **other} if one.get(key) != other.get(key))


def shown(parts: Sequence[str]) -> str:
    """Return a few of many names."""
    return ", ".join(parts[:3]) + (f" and {len(parts) - 3} more" if len(parts) > 3 else "")


# Explaining ----------------------------------------------------------------------------------------

_SEEDS: Final = {
    "torch": "torch.manual_seed(...) before the model is made",
    "python": "random.seed(...)",
    "numpy": "numpy.random.seed(...)",
    "cuda": "torch.cuda.manual_seed_all(...)",
}


def explain(reference: Record, attempts: Sequence[Record], differences: Sequence[Difference]) -> list[str]:
    """Return the likely causes of the first differences."""
    causes: list[str] = []
    for attempt in attempts:
        causes += [f"a checkpoint could not be written: {error}" for error in attempt.failed_saves]
    if attempts[-1].code > 0:
        causes.append(f"the script failed when it was started again:\n{tail(attempts[-1].output)}")
    if not differences:
        if not causes and not any(attempt.resumed_at for attempt in attempts):
            causes.append("no attempt went on from a checkpoint: each began anew")
        return causes
    by_kind = {difference.kind: difference for difference in differences}
    earliest = min(differences, key=lambda each: (each.attempt, each.run, each.step))
    attempt = attempts[earliest.attempt]
    start = attempt.starts.get(earliest.run)
    if start is not None and not start["resumed"]:
        return [*causes, _not_reproducible(without_seed(reference, attempts, earliest.run), by_kind)]
    at_once = [each for each in differences if _place(each) == _place(earliest)]
    kinds = {each.kind for each in at_once}
    resumed = attempt.resumed.get(earliest.run)
    if resumed is not None and resumed["exactness"] != "bitwise":
        causes.append(f"the resumed run says so itself ({resumed['exactness']}): {resumed['reasons']}")
    elif "data" in kinds:
        causes.append(_other_data(by_kind["data"], differences))
    elif "random numbers" in kinds:
        parts = shown(by_kind["random numbers"].parts)
        causes.append(
            f"something beside the training draws from the global generator of {parts}, or draws by the clock"
        )
    elif "losses" in kinds:
        causes.append(
            "same data, same random numbers, another loss: the step uses something that no state_dict holds (a "
            "variable of the script, an attribute of the model or of a callback: make it a buffer, or give its "
            "owner state_dict and load_state_dict), or a kernel that is not deterministic (deterministic=True)"
        )
    if "number of steps" in by_kind:
        by_clock = [each for each in reference.starts.values() if each["max_time"] is not None]
        causes.append(
            "max_time ends the run by the clock: give epochs or max_steps"
            if by_clock
            else "the number of steps differs: the length of the data, or a stop, hangs on something not saved"
        )
    if not causes:
        causes.append(
            "every step was equal, the state at the end is not: something changes it without a step, or holds "
            "more than a step uses"
        )
    return causes


def _place(difference: Difference) -> tuple[int, int, int]:
    return difference.attempt, difference.run, difference.step


def _not_reproducible(unseeded: Sequence[str], by_kind: Mapping[str, Difference]) -> str:
    """Explain a difference that was there before anything was resumed."""
    begun = "the script differs from run to run, before anything is resumed"
    seeds = [_SEEDS[part] for part in unseeded if part in _SEEDS]
    if "first weights" in by_kind or seeds:
        return f"{begun}: there is no seed. Call {'; '.join(seeds) or _SEEDS['torch']}"
    if "data" in by_kind:
        return (
            f"{begun}: the data of step {by_kind['data'].step} do, which come from a generator without a seed"
        )
    return f"{begun}: the losses do, on the same data: a kernel is not deterministic (deterministic=True)"


def _other_data(difference: Difference, differences: Sequence[Difference]) -> str:
    if any(each.kind == "random numbers" and _place(each) == _place(difference) for each in differences):
        return (
            "other data and other random numbers after the resume: something draws from the global generators "
            "between the resume and the first batch, such as a loader that is asked twice"
        )
    return (
        f"other data ({difference.detail}), the global random numbers being the same: the data set, its transform or "
        "its sampler draws from a generator of its own (random.Random(), numpy.random.default_rng(), "
        "torch.Generator()) or counts for itself. Draw from the global generators, or give it state_dict and "
        "load_state_dict"
    )


# Saying so -----------------------------------------------------------------------------------------


def tail(output: str) -> str:
    """Return the last lines of what a script has printed."""
    lines = output.strip().splitlines()
    return "\n".join(lines[-OUTPUT_LINES:]) or "(it printed nothing)"


def print_verdict(console: Console, verdict: Verdict) -> None:
    """Print how the attempts went, what differs from where on, and why that may be."""
    count = len(verdict.reference.runs)
    console.print(
        f"Uninterrupted: {len(verdict.reference.steps)} steps" + (f" in {count} runs" if count > 1 else "")
    )
    table = Table("  attempt", box=None, padding=(0, 2, 0, 0))
    for column in ("resumed at step", "exactness", "last step", "end"):
        table.add_column(column)
    for number, attempt in enumerate(verdict.attempts):
        resumed = list(attempt.resumed.values())
        last = max(attempt.steps, default=(0, 0))[1]
        end = (
            "kill -9" if attempt.was_killed else ("complete" if not attempt.code else f"code {attempt.code}")
        )
        table.add_row(
            f"  {number}",
            f"{attempt.resumed_at[-1]}" if attempt.resumed_at else "-",
            resumed[-1]["exactness"] if resumed else "-",  # a quick kill may come before it is said
            f"{last}" if attempt.steps else "-",
            end,
        )
    console.print(table)
    found = {difference.kind: difference for difference in verdict.differences}
    table = Table("  compared", box=None, padding=(0, 2, 0, 0))
    table.add_column("bits", overflow="fold")
    for kind in ("first weights", "data", "random numbers", "losses", "number of steps", "final state"):
        difference = found.get(kind)
        text = "equal"
        if difference is not None:
            run = f" of run {difference.run}" if count > 1 else ""
            where = (
                "" if kind in ("first weights", "final state") else f" from step {difference.step}{run} on"
            )
            text = f"different{where}: {difference.detail}"
        elif verdict.attempts[-1].code and kind in ("number of steps", "final state"):
            text = "not reached"
        table.add_row(f"  {kind}", text)
    console.print(table)
    for cause in verdict.causes:
        console.print(f"Likely cause: {cause}", soft_wrap=True)
    if any(run["resume"] is None for run in verdict.reference.runs):
        console.print(
            'Note: the script gives no resume= itself; train(..., resume="auto") goes on by itself.'
        )
    if verdict.code == EQUAL:
        console.print("The killed and resumed script makes the same bits.")
    else:
        console.print("The killed and resumed script does not make the same bits.")
