"""Where a run stands in its data: which loaders it has read, in which order, and how far.

An epoch is one pass over one loader, or several: one after the other, or side by side (`zip`). A checkpoint holds
the passes of the epoch in progress, and what each loader's next epoch begins with. In a resumed epoch the passes
that were over give nothing, those that were not go on behind their last batch, and the others begin as usual.

Loaders are known by where they are: `train_loader`, `val_loader`, an attribute of the trainer (`self.second`). One
that is made anew for each epoch has no such name; its passes are continued all the same.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Final

from offloop.engine.data.loader_parts import name_of, samplers_of, set_epoch
from offloop.engine.data.random_state import capture_random_state, restore_random_state
from offloop.engine.position.epoch_locals import local_doubts
from offloop.engine.position.exactness import Doubt, approximate
from offloop.engine.position.loader_contents import Contents, content_doubts
from offloop.engine.position.loader_doubts import (
    Counters,
    counter_doubts,
    describe,
    differences,
    doubts_about,
    generators_of,
    is_stateful,
)
from offloop.engine.position.loader_position import (
    begin_epoch,
    capture_before_epoch,
    capture_in_epoch,
    continue_epoch,
    has_workers,
    rewind_loader,
)

_MOST_LOADERS: Final = 64
"""Entries of a list or mapping in which a loader is looked for by name; more of them are batches, not loaders."""

_PENDING: Final = (
    "the checkpoint was taken between batches of loaders that are read side by side: those that were read and not "
    "trained are lost"
)

_NESTED: Final = "where an epoch stood in an inner loop over a loader is not saved"

Sparing = Callable[[Iterable[Any]], AbstractContextManager[None]]


class Pass:
    """One reading of a loader in the epoch in progress."""

    __slots__ = ("asked_at", "before", "given", "is_done", "loader", "name", "start")

    def __init__(self, name: str, loader: Iterable[Any], start: int, before: dict[str, Any] | None) -> None:
        self.name = name
        self.loader = loader
        self.start = start  # batches that the epoch had before it
        self.before = before
        self.given: int | None = None  # batches so far; None where all since `start` are of this pass
        self.is_done = False  # it has ended, or was left for good
        self.asked_at: int | None = None  # how far the first of several open passes was then


class DataPosition:
    """The position of one run in its loaders. Training thread only."""

    def __init__(
        self,
        program: object,
        train_loader: Iterable[Any],
        val_loader: Iterable[Any] | None,
        *,
        is_resumable: bool,
    ) -> None:
        """Begin before the first epoch.

        Args:
            program: The trainer, whose attributes name its other loaders.
            train_loader: Of the run.
            val_loader: Of the run.
            is_resumable: True where checkpoints may be taken; without them nothing is captured.
        """
        self._roots = {"train_loader": train_loader, "val_loader": val_loader}
        self._program = program
        self._is_resumable = is_resumable
        self._training: dict[str, _Known] = {"train_loader": _Known(train_loader)}
        self._validation: dict[str, _Known] = {}
        if val_loader is not None and not isinstance(val_loader, Mapping):
            self._validation["val_loader"] = _Known(val_loader)
        self.passes: list[Pass] = []
        self.asking: Pass | None = None  # the pass whose next batch is about to be asked for
        self._is_interleaved = False  # True if a pass of this epoch began before another had ended
        self._is_nested = False  # True if one gave several batches for one batch of the first
        self.is_cut = False  # True if a pass of this epoch was asked for and refused: the run was ending
        self.doubts: list[Doubt] = []  # about what was restored
        self._saved: dict[str, Any] = {}  # what a resumed run continues
        self._left_behind: list[Doubt] = []  # about variables of the user's epoch, when it was left
        self._nameless: dict[int, list[Doubt]] = {}  # by number of the pass: about loaders that have no place

    # Epochs and passes ------------------------------------------------------------------------------

    def begin_epoch(self, batches: int) -> None:
        """Forget the passes of the epoch before, which has given this many batches."""
        for each in self.passes:
            known = self._training.get(each.name)
            if known is not None:
                known.read += self._given(each, batches)
        self.passes = []
        self._saved = {}
        self._left_behind = []
        self.is_cut = self._is_interleaved = self._is_nested = False

    def leave_epoch(self) -> None:
        """Call inside of the user's epoch when it is about to be left before its end: its variables go with it."""
        if self._is_resumable:
            self._left_behind = local_doubts(self._program)

    def _given(self, each: Pass, batches: int) -> int:
        return batches - each.start if each.given is None else each.given

    @property
    def current(self) -> Pass:
        """The pass begun last."""
        return self.passes[-1]

    def saved_pass(self) -> dict[str, Any] | None:
        """Return the pass of the interrupted epoch that the next one continues; None if the next one is a new one."""
        saved: list[dict[str, Any]] = self._saved.get("passes", [])
        return saved[len(self.passes)] if len(self.passes) < len(saved) else None

    def begin(self, loader: Iterable[Any], read: Iterable[Any], *, epoch: int, start: int) -> None:
        """Begin a pass: call before `iter(read)`.

        Args:
            loader: What the user has given.
            read: What is iterated over: the same, or its twin that seeds its samples.
            epoch: Number of the epoch, for `set_epoch`.
            start: Batches that the epoch has given so far.
        """
        for each in self.passes:
            if each.given is None:
                each.given = start - each.start
        name = self._name(loader)
        known = self._training.get(name) if name else _Known(read)
        if known is None:
            known = self._training[name] = _Known(read)
        known.begin(read, epoch)
        if not name:
            self._nameless[len(self.passes)] = _doubts_about_nameless(read)
        before = capture_before_epoch(read) if self._is_resumable else None
        self._add(Pass(name, read, start, before))

    def _add(self, each: Pass) -> None:
        self._is_interleaved |= any(not other.is_done for other in self.passes)
        self.passes.append(each)

    def begin_validation(self, loader: Iterable[Any], epoch: int) -> None:
        """Call before `iter(loader)` in a validation."""
        name = self._name(loader)
        if not name:
            set_epoch(loader, epoch)
            return
        if name not in self._validation:
            self._validation[name] = _Known(loader)
        self._validation[name].begin(loader, epoch)

    def before_validation(self) -> dict[str, Any]:
        """Return what `rewind_validation` puts back."""
        return {
            "random": capture_random_state(),
            "loaders": {name: known.capture() for name, known in self._validation.items()},
        }

    def rewind_validation(self, before: Mapping[str, Any]) -> None:
        """Put back what a validation has drawn and read, as if it had not been. Its workers stay."""
        restore_random_state(before["random"])
        for name in list(self._validation):
            if name in before["loaders"]:
                self._validation[name].rewind(before["loaders"][name])
            else:
                del self._validation[name]  # first read by that validation

    def drawn_before_first_batch(self) -> None:
        """Say that a command may have drawn random numbers after `iter(loader)`: samplers draw with the first batch."""
        before = self.current.before
        if before is not None and not getattr(self.current.loader, "num_workers", 0):
            before["first"] = capture_random_state()

    def skip(self, saved: Mapping[str, Any], loader: Iterable[Any]) -> None:
        """Record a pass that was over when the run was interrupted."""
        done = Pass(saved["loader"], loader, 0, saved["before"])
        done.given, done.is_done = saved["given"], True
        self.passes.append(done)

    def go_on(
        self, saved: Mapping[str, Any], read: Iterable[Any], *, epoch: int, start: int, keep_random: bool
    ) -> Iterator[Any]:
        """Return an iterator over the rest of a pass that was interrupted.

        Args:
            saved: The pass, from `saved_pass`.
            read: Its loader, as it is iterated over.
            epoch: Number of the epoch.
            start: Batches that the epoch has given so far.
            keep_random: True to leave the global generators alone: the run has them back already.
        """
        name, given, before = saved["loader"], saved["given"], saved["before"]
        now = self._saved["loaders"].get(name) or saved["now"]
        known = self._training.setdefault(name, _Known(read)) if name else _Known(read)
        known.begin(read, epoch)
        kept = capture_random_state() if keep_random else None
        iterator, doubts = continue_epoch(read, given, before, now, now.get("read"))
        if kept is not None:
            restore_random_state(kept)
        self.doubts += _prefixed(name, doubts)
        self._add(Pass(name, read, start - given, before))
        return iterator

    @property
    def is_complete(self) -> bool:
        """True if the epoch has no batch left, though the run is ending."""
        return not self.is_cut and all(each.is_done for each in self.passes)

    def is_boundary(self, current: Pass) -> bool:
        """True if the run may be interrupted before the next batch of a pass.

        Where passes are read side by side, that is before the next batch of the first: it is asked for when the
        batches of the others are trained. One that is asked for a second batch meanwhile is an inner loop, which
        must not hold up a command.
        """
        self.asking = current
        if not self._is_interleaved:
            return True
        first = next((each for each in self.passes if not each.is_done), current)
        if first is current:
            return True
        if current.asked_at == first.given:
            self._is_nested = True
            return True
        current.asked_at = first.given
        return False

    def close(self) -> None:
        """Let all loaders go."""
        self.passes, self._roots, self._saved = [], {}, {}
        self._training, self._validation = {}, {}

    # Checkpoints ------------------------------------------------------------------------------------

    def capture(self, *, in_epoch: bool, batches: int) -> dict[str, Any]:
        """Return the position as of this boundary, for a checkpoint.

        Args:
            in_epoch: True in the middle of an epoch.
            batches: How many the epoch has given.
        """
        waiting = self._saved.get("passes", [])[len(self.passes) :] if in_epoch else []
        passes = []
        for each in self.passes:
            given = self._given(each, batches)
            saved = {"loader": each.name, "given": given, "is_done": each.is_done, "before": each.before}
            if in_epoch and not each.name and not each.is_done:
                saved["now"] = capture_in_epoch(each.loader) | {"read": given}
            passes.append(saved)
        passes += waiting  # of a resumed epoch, not begun yet
        not_restored = {each["loader"] for each in waiting if not each["is_done"]}
        loaders = {
            name: self._saved["loaders"][name]
            if name in not_restored
            else known.capture(read=_read_in(passes, name))
            for name, known in self._training.items()
        }
        doubts = [doubt for each in self._nameless.values() for doubt in each]
        open_ones = [each for each in self.passes if not each.is_done] if in_epoch else []
        if in_epoch and self._is_nested:
            doubts.append(approximate(_NESTED))
        elif len(open_ones) > 1 and self.asking is not open_ones[0]:
            doubts.append(approximate(_PENDING))
        if in_epoch:
            doubts += self._left_behind or local_doubts(self._program)
        return {
            "passes": passes if in_epoch else [],
            "loaders": loaders,
            "validation": {name: known.capture() for name, known in self._validation.items()},
            "doubts": [list(each) for each in doubts],
        }

    def restore(
        self,
        saved: Mapping[str, Any],
        *,
        in_epoch: bool,
        seeded: Callable[[Iterable[Any]], Iterable[Any]],
        spared: Sparing,
        batches: int,
    ) -> bool:
        """Put back where the loaders stood, all but those that stood in the middle of a pass.

        Random states are not kept: they are put back after it.

        Args:
            saved: From `capture`.
            in_epoch: True if the run goes on in the middle of an epoch.
            seeded: Returns the twin of a training loader.
            spared: Makes the block in which workers are started.
            batches: How many the epoch has given.

        Returns:
            True if there are passes of the interrupted epoch to continue or to leave out.
        """
        self._saved = dict(saved) if "passes" in saved else _from_older(saved, batches)
        if not in_epoch:
            self._saved["passes"] = []
        self.doubts += [Doubt(*each) for each in self._saved["doubts"]]
        open_ones = {each["loader"] for each in self._saved["passes"] if not each["is_done"]}
        for kind, book in (("loaders", self._training), ("validation", self._validation)):
            for name, now in self._saved[kind].items():
                loader = self._find(name)
                if loader is None:
                    self.doubts.append(approximate(f"{name}, which the run was reading, is not there"))
                    continue
                read = seeded(loader) if kind == "loaders" else loader
                known = book[name] = _Known(read)
                is_open = kind == "loaders" and name in open_ones
                count = _read_in(self._saved["passes"], name) if kind == "loaders" else 0
                with spared(read):
                    self.doubts += _prefixed(name, known.restore(now, is_open=is_open, in_epoch=count))
        if "validation" not in saved:
            self.doubts += [
                approximate(f"{name}: a checkpoint of an older version does not say where it stood")
                for name, known in self._validation.items()
                if has_workers(known.loader) or _has_own_state(known.loader)
            ]
        return bool(self._saved["passes"])

    # Names --------------------------------------------------------------------------------------------

    def _name(self, loader: Iterable[Any]) -> str:
        """Return where a loader is found, empty where it is in no such place."""
        return next((name for name, each in self._places() if each is loader), "")

    def _find(self, name: str) -> Iterable[Any] | None:
        return next((each for place, each in self._places() if place == name), None)

    def _places(self) -> Iterator[tuple[str, Any]]:
        attributes = {f"self.{name}": value for name, value in vars(self._program).items()}
        places = [(name, value) for name, value in (self._roots | attributes).items() if value is not None]
        yield from places
        for name, value in places:
            if isinstance(value, Mapping) and len(value) <= _MOST_LOADERS:
                yield from ((f"{name}[{key!r}]", each) for key, each in value.items())
            elif isinstance(value, list | tuple) and len(value) <= _MOST_LOADERS:
                yield from ((f"{name}[{index}]", each) for index, each in enumerate(value))


class _Known:
    """A loader that the run reads."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.read = 0  # batches of epochs that are over
        self._epoch: int | None = None  # that set_epoch was called with last
        self._described: dict[str, Any] | None = None
        self._counters: Counters | None = None
        self._contents: Contents | None = None
        self._had_workers = True  # False if those that it has are of a reading that does not count

    def begin(self, loader: Iterable[Any], epoch: int) -> None:
        """An epoch of it begins."""
        self.loader = loader  # a twin, from its first epoch on
        self._look()
        self._epoch, self._had_workers = epoch, True
        set_epoch(loader, epoch)

    def capture(self, read: int = 0) -> dict[str, Any]:
        """Return what its next epoch begins with.

        Args:
            read: Batches that the epoch in progress has had from it.
        """
        self._look()
        assert self._counters is not None
        assert self._contents is not None
        now = capture_in_epoch(self.loader)
        return now | {
            "has_workers": now["has_workers"] and self._had_workers,
            "read": self.read + read,
            "epoch": self._epoch,
            "description": self._described,
            "counters": self._counters.changed(self.loader),
            "contents": self._contents.changed(self.loader),
        }

    def restore(self, now: Mapping[str, Any], *, is_open: bool, in_epoch: int = 0) -> list[Doubt]:
        """Put back what its next epoch begins with, and return all doubts about it.

        Args:
            now: From `capture`.
            is_open: True if a pass over it goes on: that is left to `continue_epoch`.
            in_epoch: Batches that the epoch in progress has had from it.
        """
        self._look()
        assert self._described is not None
        self.read = now.get("read", in_epoch) - in_epoch
        doubts = differences(now.get("description") or {}, self._described)
        self._epoch = now.get("epoch")
        if self._epoch is not None:
            set_epoch(self.loader, self._epoch)
        if not is_open:
            doubts += begin_epoch(self.loader, now, self.read + in_epoch)
        doubts += counter_doubts(self.loader, now.get("counters", {}))
        doubts += content_doubts(self.loader, now.get("contents", {}))
        return doubts + doubts_about(self.loader)

    def rewind(self, before: Mapping[str, Any]) -> None:
        """Put back what `capture` returned, in the run that it was taken from."""
        rewind_loader(self.loader, before)
        self._epoch = before["epoch"]
        set_epoch(self.loader, self._epoch or 0)
        self._had_workers = before["has_workers"]

    def _look(self) -> None:
        """Remember what it was before the run has read from it."""
        if self._counters is None:
            self._described = describe(self.loader)
            self._counters = Counters(self.loader)
            self._contents = Contents(self.loader)


def _read_in(passes: Iterable[Mapping[str, Any]], name: str) -> int:
    """Return how many batches saved passes have had from a loader."""
    return sum(each["given"] for each in passes if each["loader"] == name)


def _doubts_about_nameless(loader: Iterable[Any]) -> list[Doubt]:
    """Return the doubts about a loader that is found nowhere: what it is between epochs is not restored."""
    doubts = doubts_about(loader)
    if _has_own_state(loader) or has_workers(loader):
        doubts.append(
            approximate(
                f"a {name_of(loader)} that is no attribute of the trainer has a state, which is not restored between "
                "epochs: keep it as self.name"
            )
        )
    return doubts


def _has_own_state(loader: Iterable[Any]) -> bool:
    parts = (loader, *samplers_of(loader), getattr(loader, "dataset", None))
    return bool(generators_of(loader)) or any(is_stateful(each) for each in parts)


def _prefixed(name: str, doubts: Iterable[Doubt]) -> list[Doubt]:
    """Return the doubts with the loader's name before them, where it is not the usual one."""
    if name in ("", "train_loader"):
        return list(doubts)
    return [Doubt(each.exactness, f"{name}: {each.reason}") for each in doubts]


def _from_older(saved: Mapping[str, Any], batches: int) -> dict[str, Any]:
    """Return the position that format 1 had before passes: one loader, and where it stood."""
    passes = []
    if saved["before"] is not None:
        passes.append(
            {"loader": "train_loader", "given": batches, "is_done": False, "before": saved["before"]}
        )
    return {"passes": passes, "loaders": {"train_loader": saved["now"]}, "validation": {}, "doubts": []}
