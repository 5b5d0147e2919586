"""The position of a run in its data: the loaders that it has read, in which order, and how far.

An epoch is a pass over a loader, or several passes: one after the other, or in parallel (`zip`). A checkpoint holds
the passes of the current epoch, and the state from which the next epoch of every loader starts. In a resumed epoch,
finished passes give nothing, unfinished ones continue after their last batch, and the others start as usual.

Loaders are known by their places: `train_loader`, `val_loader`, an attribute of the trainer (`self.second`). A loader
that is made for every epoch has no place; its passes are continued nevertheless.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Final

from offloop.engine.data.batches import length_of
from offloop.engine.data.loader_parts import name_of, samplers_of, set_epoch
from offloop.engine.data.random_state import capture_random_state, restore_random_state
from offloop.engine.data.twin import batches_per_step
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
"""Longest list or mapping that is searched for loaders; longer ones hold batches."""

_PENDING: Final = (
    "the checkpoint was taken between batches of loaders that are read in parallel: batches that were read but not "
    "trained are lost"
)

_NESTED: Final = "the position in an inner loop over a loader is not saved"

Sparing = Callable[[Iterable[Any]], AbstractContextManager[None]]


class Pass:
    """One pass over a loader in the current epoch."""

    __slots__ = ("asked_at", "before", "given", "is_done", "loader", "name", "start")

    def __init__(self, name: str, loader: Iterable[Any], start: int, before: dict[str, Any] | None) -> None:
        self.name = name
        self.loader = loader
        # Batches that the epoch had before this pass.
        self.start = start
        self.before = before
        # Batches so far; None if all batches since `start` belong to this pass.
        self.given: int | None = None
        # It has ended or was abandoned.
        self.is_done = False
        # Position of the first of several open passes when this one was last asked for a batch.
        self.asked_at: int | None = None


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
        """Start before the first epoch.

        Args:
            program: The trainer, whose attributes name its other loaders.
            train_loader: The run's training loader.
            val_loader: The run's validation loader, or several by name.
            is_resumable: Whether checkpoints may be taken; otherwise nothing is captured.
        """
        self._roots = {"train_loader": train_loader, "val_loader": val_loader}
        self._program = program
        self._is_resumable = is_resumable
        self._training: dict[str, _Known] = {"train_loader": _Known(train_loader)}
        self._validation: dict[str, _Known] = {}
        if val_loader is not None and not isinstance(val_loader, Mapping):
            self._validation["val_loader"] = _Known(val_loader)
        self.passes: list[Pass] = []
        # The pass that will be asked for the next batch.
        self.asking: Pass | None = None
        # True if a pass of this epoch started before another one had ended.
        self._is_interleaved = False
        # True if a pass gave several batches for one batch of the first.
        self._is_nested = False
        # True if a pass of this epoch was refused, because the run was ending.
        self.is_cut = False
        # Doubts about what was restored.
        self.doubts: list[Doubt] = []
        # What a resumed run continues.
        self._saved: dict[str, Any] = {}
        # Doubts about variables of the user's epoch when it was left.
        self._local_doubts: list[Doubt] = []
        # Doubts about loaders without a place, by number of the pass.
        self._nameless: dict[int, list[Doubt]] = {}

    # Epochs and passes ------------------------------------------------------------------------------

    def begin_epoch(self, batches: int) -> None:
        """Clear the passes of the previous epoch, which has given this many batches."""
        for each in self.passes:
            known = self._training.get(each.name)
            if known is not None:
                known.read += self._given(each, batches)
        self.passes = []
        self._saved = {}
        self._local_doubts = []
        self.is_cut = self._is_interleaved = self._is_nested = False

    def leave_epoch(self) -> None:
        """Record the variables of the user's epoch. Call inside it, before it is left early."""
        if self._is_resumable:
            self._local_doubts = local_doubts(self._program)

    def _given(self, each: Pass, batches: int) -> int:
        return batches - each.start if each.given is None else each.given

    @property
    def current(self) -> Pass:
        """The pass that started last."""
        return self.passes[-1]

    def saved_pass(self) -> dict[str, Any] | None:
        """Return the saved pass that the next one continues; None if the next one is new."""
        saved: list[dict[str, Any]] = self._saved.get("passes", [])
        return saved[len(self.passes)] if len(self.passes) < len(saved) else None

    def begin(self, loader: Iterable[Any], read: Iterable[Any], *, epoch: int, start: int) -> None:
        """Start a pass. Call before `iter(read)`.

        Args:
            loader: The user's loader.
            read: The loader that is iterated over: the same, or its twin that seeds or shares its samples.
            epoch: Number of the epoch, for `set_epoch`.
            start: Batches that the epoch has given so far.
        """
        for each in self.passes:
            if each.given is None:
                each.given = start - each.start
        name = self._name(loader)
        known = self._training.get(name) if name else _Known(read, loader)
        if known is None:
            known = self._training[name] = _Known(read, loader)
        known.begin(read, epoch)
        if not name:
            self._nameless[len(self.passes)] = _doubts_about_nameless(read)
        before = capture_before_epoch(read) if self._is_resumable else None
        self._add(Pass(name, read, start, before))

    def _add(self, each: Pass) -> None:
        self._is_interleaved |= any(not other.is_done for other in self.passes)
        self.passes.append(each)

    def begin_validation(self, loader: Iterable[Any], read: Iterable[Any], epoch: int) -> None:
        """Call before `iter(read)` in a validation; see `begin`."""
        name = self._name(loader)
        if not name:
            set_epoch(read, epoch)
            return
        if name not in self._validation:
            self._validation[name] = _Known(read, loader)
        self._validation[name].begin(read, epoch)

    def before_validation(self) -> dict[str, Any]:
        """Return the state that `rewind_validation` restores."""
        return {
            "random": capture_random_state(),
            "loaders": {name: known.capture() for name, known in self._validation.items()},
        }

    def rewind_validation(self, before: Mapping[str, Any]) -> None:
        """Restore random states and loaders as before a validation. Workers stay."""
        restore_random_state(before["random"])
        for name in list(self._validation):
            if name in before["loaders"]:
                self._validation[name].rewind(before["loaders"][name])
            else:
                # That validation was the first to read it.
                del self._validation[name]

    def drawn_before_first_batch(self) -> None:
        """Capture the random states again after commands that may have drawn from them.

        Samplers draw when the first batch is asked for, not in `iter(loader)`.
        """
        before = self.current.before
        if before is not None and not getattr(self.current.loader, "num_workers", 0):
            before["first"] = capture_random_state()

    def skip(self, saved: Mapping[str, Any], loader: Iterable[Any]) -> None:
        """Record a pass that had ended when the run was interrupted."""
        done = Pass(saved["loader"], loader, 0, saved["before"])
        done.given, done.is_done = saved["given"], True
        self.passes.append(done)

    def continue_pass(
        self, saved: Mapping[str, Any], read: Iterable[Any], *, epoch: int, start: int, keep_random: bool
    ) -> Iterator[Any]:
        """Return an iterator over the rest of an interrupted pass.

        Args:
            saved: The pass, from `saved_pass`.
            read: The loader that is iterated over.
            epoch: Number of the epoch.
            start: Batches that the epoch has given so far.
            keep_random: Whether to keep the global generators, which the run has restored already.
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
        """True if the epoch has no batch left, even if the run is ending."""
        return not self.is_cut and all(each.is_done for each in self.passes)

    def is_boundary(self, current: Pass) -> bool:
        """Return whether the run may be interrupted before the next batch of a pass.

        With passes in parallel, that is before the next batch of the first pass: then the batches of the others are
        trained. A pass that is asked for a second batch before that is an inner loop, which must not delay commands.
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
        """Drop all loaders."""
        self.passes, self._roots, self._saved = [], {}, {}
        self._training, self._validation = {}, {}

    # Checkpoints ------------------------------------------------------------------------------------

    def capture(self, *, in_epoch: bool, batches: int) -> dict[str, Any]:
        """Return the position at this boundary, for a checkpoint.

        Args:
            in_epoch: Whether the run is inside an epoch.
            batches: Batches that the epoch has given.
        """
        waiting = self._saved.get("passes", [])[len(self.passes) :] if in_epoch else []
        passes = []
        for each in self.passes:
            given = self._given(each, batches)
            saved = {"loader": each.name, "given": given, "is_done": each.is_done, "before": each.before}
            if in_epoch and not each.name and not each.is_done:
                saved["now"] = capture_in_epoch(each.loader) | {"read": given}
            passes.append(saved)
        # Passes of a resumed epoch that have not started yet.
        passes += waiting
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
            doubts += self._local_doubts or local_doubts(self._program)
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
        training: Callable[[Iterable[Any]], Iterable[Any]],
        validation: Callable[[Iterable[Any]], Iterable[Any]],
        spared: Sparing,
        batches: int,
    ) -> bool:
        """Restore the loaders, except for those inside a pass.

        Changes random states; the caller restores them afterwards.

        Args:
            saved: From `capture`.
            in_epoch: Whether the run continues inside an epoch.
            training: Returns the loader that is read for a training loader: itself, or a twin.
            validation: The same for a loader of validations.
            spared: Returns the context in which workers are started.
            batches: Batches that the epoch has given.

        Returns:
            True if the interrupted epoch has passes to continue or to skip.
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
                    self.doubts.append(approximate(f"{name}, which the run was reading, does not exist"))
                    continue
                read = training(loader) if kind == "loaders" else validation(loader)
                known = book[name] = _Known(read, loader)
                is_open = kind == "loaders" and name in open_ones
                count = _read_in(self._saved["passes"], name) if kind == "loaders" else 0
                with spared(read):
                    self.doubts += _prefixed(name, known.restore(now, is_open=is_open, in_epoch=count))
        if "validation" not in saved:
            self.doubts += [
                approximate(f"{name}: a checkpoint of an older version does not have its position")
                for name, known in self._validation.items()
                if has_workers(known.loader) or _has_own_state(known.loader)
            ]
        return bool(self._saved["passes"])

    # Names --------------------------------------------------------------------------------------------

    def _name(self, loader: Iterable[Any]) -> str:
        """Return the place of a loader, empty if it has none."""
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

    def __init__(self, read: Iterable[Any], whole: Iterable[Any] | None = None) -> None:
        """Begin before the first epoch.

        Args:
            read: The loader that is iterated over.
            whole: The user's, where `read` is its twin: that may have the batches of one process of several.
        """
        self.loader = read
        self._whole = read if whole is None else whole
        # Batches of finished epochs.
        self.read = 0
        # The last argument of set_epoch.
        self._epoch: int | None = None
        self._described: dict[str, Any] | None = None
        self._counters: Counters | None = None
        self._contents: Contents | None = None
        # False if its workers belong to a pass that does not count.
        self._had_workers = True

    def begin(self, loader: Iterable[Any], epoch: int) -> None:
        """Start an epoch of this loader."""
        # From the first epoch on it may be a twin.
        self.loader = loader
        self._look()
        self._epoch, self._had_workers = epoch, True
        set_epoch(loader, epoch)

    def capture(self, read: int = 0) -> dict[str, Any]:
        """Return the state from which its next epoch starts.

        Args:
            read: Batches that the current epoch has read from it.
        """
        self._look()
        assert self._described is not None
        assert self._counters is not None
        assert self._contents is not None
        now = capture_in_epoch(self.loader)
        return now | {
            "has_workers": now["has_workers"] and self._had_workers,
            "read": self.read + read,
            "epoch": self._epoch,
            # Before its first epoch it has no twin
            "description": self._described | ({} if self._epoch is None else self._steps()),
            "counters": self._counters.changed(self.loader),
            "contents": self._contents.changed(self.loader),
        }

    def restore(self, now: Mapping[str, Any], *, is_open: bool, in_epoch: int = 0) -> list[Doubt]:
        """Restore the state from which its next epoch starts, and return all doubts about it.

        Args:
            now: From `capture`.
            is_open: Whether a pass over it continues; `continue_epoch` does the rest then.
            in_epoch: Batches that the current epoch has read from it.
        """
        self._look()
        assert self._described is not None
        self.read = now.get("read", in_epoch) - in_epoch
        doubts = differences(now.get("description") or {}, self._described | self._steps())
        self._epoch = now.get("epoch")
        if self._epoch is not None:
            set_epoch(self.loader, self._epoch)
        if not is_open:
            doubts += begin_epoch(self.loader, now, self.read + in_epoch)
        doubts += counter_doubts(self.loader, now.get("counters", {}))
        doubts += content_doubts(self.loader, now.get("contents", {}))
        return doubts + doubts_about(self.loader)

    def rewind(self, before: Mapping[str, Any]) -> None:
        """Restore what `capture` returned, in the same run."""
        rewind_loader(self.loader, before)
        self._epoch = before["epoch"]
        set_epoch(self.loader, self._epoch or 0)
        self._had_workers = before["has_workers"]

    def _steps(self) -> dict[str, int]:
        return {"batches per step": batches_per_step(self.loader)}

    def _look(self) -> None:
        """Record its state before the run reads from it."""
        if self._counters is None:
            self._described = describe(self.loader) | {"batches": length_of(self._whole)}
            self._counters = Counters(self.loader)
            self._contents = Contents(self.loader)


def _read_in(passes: Iterable[Mapping[str, Any]], name: str) -> int:
    """Return the number of batches that saved passes have had from a loader."""
    return sum(each["given"] for each in passes if each["loader"] == name)


def _doubts_about_nameless(loader: Iterable[Any]) -> list[Doubt]:
    """Return the doubts about a loader without a place, whose state between epochs is not restored."""
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
    """Return the doubts, prefixed with the loader's name unless it is `train_loader`."""
    if name in ("", "train_loader"):
        return list(doubts)
    return [Doubt(each.exactness, f"{name}: {each.reason}") for each in doubts]


def _from_older(saved: Mapping[str, Any], batches: int) -> dict[str, Any]:
    """Convert the position of early checkpoints of format 1: one loader and its position."""
    passes = []
    if saved["before"] is not None:
        passes.append(
            {"loader": "train_loader", "given": batches, "is_done": False, "before": saved["before"]}
        )
    return {"passes": passes, "loaders": {"train_loader": saved["now"]}, "validation": {}, "doubts": []}
