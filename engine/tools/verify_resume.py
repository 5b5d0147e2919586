"""Verifies that a training script, killed and resumed, computes the same bits as an uninterrupted one.

The script runs once uninterrupted, and once with `kill -9` at random points and a resume after every kill. For all
steps the data, the states of the random generators and the loss are compared, at the end the whole state.
`resume_probe.py` runs the script and records these; `offloop verify-resume` is the command.
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

from offloop.engine.errors import OffloopError

AFTER_SAVE: Final = 0.7
"""Share of the kills that wait for the previous checkpoint; the others may interrupt its writing."""
LONGEST_DELAY: Final = 5.0
"""Longest delay of a kill in seconds: with slow steps, one more is enough."""
OUTPUT_LINES: Final = 15
"""Lines of a failed script's output to show."""

Position = tuple[int, int]
"""Number of the script's run, and the step in it."""


class UnusableError(OffloopError):
    """The script cannot be verified: the text says why."""


class Kill(msgspec.Struct, frozen=True):
    """When to kill an attempt."""

    run: int
    """Number of the script's run, from 0."""
    step: int
    """The step after which a checkpoint is taken."""
    after_save: bool
    """Wait until that checkpoint is durable; otherwise the kill may interrupt its writing."""
    delay: float
    """Seconds to wait after that."""
    last: int
    """The run's last step. It is killed there at the latest, so that there is something to resume."""


class Attempt(msgspec.Struct, frozen=True):
    """One execution of the script."""

    script: str
    arguments: list[str]
    runs: str
    """Directory for its runs."""
    record: str
    """File for the probe's record."""
    output: str
    """File for the script's output."""
    kill: Kill | None


@dataclass
class Record:
    """The record of an attempt."""

    code: int
    """Exit code, or minus the signal that ended it."""
    output: str
    runs: list[dict[str, Any]] = field(default_factory=list)
    starts: dict[int, dict[str, Any]] = field(default_factory=dict)
    resumed: dict[int, dict[str, Any]] = field(default_factory=dict)
    steps: dict[Position, dict[str, Any]] = field(default_factory=dict)
    ends: dict[int, dict[str, Any]] = field(default_factory=dict)
    failed_saves: list[str] = field(default_factory=list)

    @property
    def resumed_at(self) -> list[int]:
        """The steps from which its runs were resumed."""
        return [start["step"] for start in self.starts.values() if start["resumed"]]

    @property
    def was_killed(self) -> bool:
        """True if the kill ended it."""
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
    """The generators, tensors of a batch, or parts of the state that differ."""


@dataclass(frozen=True)
class Verdict:
    """The result of a verification."""

    reference: Record
    attempts: list[Record]
    differences: list[Difference]
    causes: list[str]

    @property
    def is_equal(self) -> bool:
        """True if all bits are equal, nothing failed, and at least one attempt was resumed."""
        was_resumed = any(attempt.resumed_at for attempt in self.attempts)
        failed = self.attempts[-1].code or any(attempt.failed_saves for attempt in self.attempts)
        return not (self.differences or failed) and was_resumed


class Nursery:
    """A process that has imported torch and forks for every attempt."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "offloop.engine.tools.resume_probe"],
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
        """Run the script once, to its end or its kill. Blocks."""
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
    """Read the record of an attempt."""
    record = Record(code, Path(attempt.output).read_text(errors="replace"))
    path = Path(attempt.record)
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            # The kill interrupted this line.
            continue
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
        script: A script that trains with offloop.
        arguments: Its command line.
        kills: Number of kills, at least 1.
        seed: Seed of the choice of places.
        directory: An empty directory for runs and records.
        nursery: Runs the script.

    Raises:
        UnusableError: The script fails without a kill, or has nothing to resume.
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
            # It ended before the kill, or failed.
            break
    if attempts[-1].was_killed:
        attempts.append(attempt(f"attempt-{len(attempts)}", "killed", None))
    differences = list(compare(reference, attempts))
    return Verdict(reference, attempts, differences, explain(reference, attempts, differences))


def check_usable(reference: Record) -> None:
    """Raise `UnusableError` unless the uninterrupted script can be verified."""
    if reference.code != 0:
        raise UnusableError(
            f"the script fails without a kill, with exit code {reference.code}:\n{tail(reference.output)}"
        )
    if not reference.runs:
        raise UnusableError("the script starts no training with offloop: no Trainer.train() was called")
    if len(reference.steps) < len(reference.ends) + 1:
        raise UnusableError(
            "there is no step to be killed after: the script must train for two steps or more"
        )


def choose_kills(reference: Record, kills: int, seed: int) -> list[Kill]:
    """Choose where to kill: after any step but the last of a run."""
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
            # The first kill waits, so that there is something to resume.
            after_save=number == 0 or source.random() < AFTER_SAVE,
            delay=min(LONGEST_DELAY, source.uniform(0, 3 * step_time)),
            last=last[run],
        )
        for number, (run, step) in enumerate(chosen)
    ]


def compare(reference: Record, attempts: Sequence[Record]) -> Iterator[Difference]:
    """Yield the first difference of every kind."""
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
    """Return the generators whose states differ at the start of executions; the script may not use them at all."""
    begun = [attempt.starts[run] for attempt in attempts if run in attempt.starts]
    return tuple(
        part
        for start in begun
        if not start["resumed"]
        for part in differing(reference.starts[run]["random"], start["random"])
    )


def merged(batches: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Join the digests of a step's batches, by path in a batch."""
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
            causes.append("no attempt was resumed from a checkpoint: all started from scratch")
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
        causes.append(f"the resumed run reports it ({resumed['exactness']}): {resumed['reasons']}")
    elif "data" in kinds:
        causes.append(_other_data(by_kind["data"], differences))
    elif "random numbers" in kinds:
        parts = shown(by_kind["random numbers"].parts)
        causes.append(
            f"something outside of the training draws from the global generator of {parts}, or depends on the clock"
        )
    elif "losses" in kinds:
        causes.append(
            "same data and random numbers, but another loss: the step uses something that no state_dict holds (a "
            "variable of the script, an attribute of the model or of a callback: make it a buffer, or give its "
            "owner state_dict and load_state_dict), or a kernel that is not deterministic (deterministic=True)"
        )
    if "number of steps" in by_kind:
        by_clock = [each for each in reference.starts.values() if each["max_time"] is not None]
        causes.append(
            "max_time ends the run by the clock: give epochs or max_steps"
            if by_clock
            else "the number of steps differs: the length of the data or a stop depends on something not saved"
        )
    if not causes:
        causes.append(
            "all steps are equal, but the final state is not: something changes it outside of steps, or holds more "
            "than steps use"
        )
    return causes


def _place(difference: Difference) -> tuple[int, int, int]:
    return difference.attempt, difference.run, difference.step


def _not_reproducible(unseeded: Sequence[str], by_kind: Mapping[str, Difference]) -> str:
    """Explain a difference that exists before anything is resumed."""
    begun = "the script differs from run to run, before anything is resumed"
    seeds = [_SEEDS[part] for part in unseeded if part in _SEEDS]
    if "first weights" in by_kind or seeds:
        return f"{begun}: there is no seed. Call {'; '.join(seeds) or _SEEDS['torch']}"
    if "data" in by_kind:
        return f"{begun}: the data of step {by_kind['data'].step} differ; they come from a generator without a seed"
    return f"{begun}: the losses differ on the same data: a kernel is not deterministic (deterministic=True)"


def _other_data(difference: Difference, differences: Sequence[Difference]) -> str:
    if any(each.kind == "random numbers" and _place(each) == _place(difference) for each in differences):
        return (
            "other data and other random numbers after the resume: something draws from the global generators "
            "between the resume and the first batch, such as a loader that is iterated twice"
        )
    return (
        f"other data ({difference.detail}) with the same global random numbers: the data set, its transform or its "
        "sampler draws from its own generator (random.Random(), numpy.random.default_rng(), torch.Generator()) or "
        "has its own counter. Draw from the global generators, or give it state_dict and load_state_dict"
    )


def tail(output: str) -> str:
    """Return the last lines of a script's output."""
    lines = output.strip().splitlines()
    return "\n".join(lines[-OUTPUT_LINES:]) or "(it printed nothing)"
