"""Iterators over a run's loaders: each starts a pass, or continues one that was interrupted."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from offloop.engine.data.random_state import capture_random_state, restore_random_state
from offloop.engine.data.seeded_sampling import SeededSampling
from offloop.engine.data.workers import spared_workers
from offloop.engine.position.data_position import DataPosition

Sharing = Callable[[Iterable[Any]], Iterable[Any]]
"""Takes a loader; returns the loader of this process's share."""


def _all(loader: Iterable[Any]) -> Iterable[Any]:
    return loader


class EpochSource:
    """Makes the iterators over a run's loaders. Training thread only."""

    def __init__(
        self,
        program: object,
        train_loader: Iterable[Any],
        val_loader: Iterable[Any] | None,
        *,
        seed: int | None,
        is_resumable: bool,
        share: Sharing = _all,
        share_validation: Sharing = _all,
    ) -> None:
        """Start before the first epoch.

        Args:
            program: The trainer. Its attributes name its other loaders.
            train_loader: The run's training loader.
            val_loader: The run's validation loader.
            seed: For `sampling="seeded"`; None: samples draw from the global generators.
            is_resumable: True where checkpoints may be taken.
            share: Returns the loader of this process's share of the training batches.
            share_validation: The same for validations.
        """
        self._share, self._share_validation = share, share_validation
        self.position = DataPosition(program, train_loader, val_loader, is_resumable=is_resumable)
        self.handles_signals = False
        """True: loader workers leave SIGINT and SIGTERM to this process. Set before the first pass."""
        self._seeding = None if seed is None else SeededSampling(seed)
        # Releasing an unfinished iterator waits for the batches that its workers are loading, so it is kept until the
        # last checkpoint is taken
        self._unfinished: list[Iterator[Any]] = []

    def restore(self, saved: Mapping[str, Any], *, in_epoch: bool, epoch: int, batches: int) -> bool:
        """Restore the positions of the loaders, except those within a pass; see `DataPosition.restore`."""
        return self.position.restore(
            saved,
            in_epoch=in_epoch,
            training=lambda loader: self._seeded(loader, epoch),
            validation=self._share_validation,
            spared=self._spared,
            batches=batches,
        )

    def begin_validation(self, loader: Iterable[Any], epoch: int) -> Iterator[Any]:
        """Return an iterator over a validation's batches."""
        read = self._share_validation(loader)
        self.position.begin_validation(loader, read, epoch)
        with self._spared(read):
            return iter(read)

    @property
    def is_interrupted_pass_next(self) -> bool:
        """True if the checkpoint holds the next pass, interrupted or complete."""
        return self.position.saved_pass() is not None

    def begin(
        self, loader: Iterable[Any], *, epoch: int, start: int, keep_random: bool
    ) -> tuple[Iterator[Any], int]:
        """Return an iterator over a training pass, and how many of its batches the epoch had before a resume.

        Args:
            loader: What the user iterates over.
            epoch: Index of the epoch.
            start: Batches of the epoch so far.
            keep_random: True to leave the global generators alone: they are already restored.
        """
        read = self._seeded(loader, epoch)
        saved = self.position.saved_pass()
        if saved is None:
            self.position.begin(loader, read, epoch=epoch, start=start)
            with self._spared(read):
                return iter(read), 0
        given: int = saved["given"]
        if saved["is_done"]:
            self.position.skip(saved, read)
            return iter(()), given
        with self._spared(read):
            return self.position.continue_pass(
                saved, read, epoch=epoch, start=start, keep_random=keep_random
            ), given

    def leave(self, iterator: Iterator[Any], *, in_training: bool) -> None:
        """Keep an iterator that the run leaves before its end until `release`."""
        self._unfinished.append(iterator)
        if in_training:
            self.position.leave_epoch()

    def release(self) -> None:
        """Release the iterators kept by `leave`. Blocks for up to some seconds while their workers finish."""
        self._unfinished.clear()

    def has_no_more(self, iterator: Iterator[Any]) -> bool:
        """Return True if an iterator that a limit ends after its last batch has no more.

        It asks the iterator as a run without the limit would, because samplers also draw at their end. If the loader's
        length was wrong, a resumed run reads that batch again.
        """
        before = capture_random_state()
        try:
            next(iterator)
        except StopIteration:
            return True
        restore_random_state(before)
        return False

    def close(self) -> None:
        """Release all loaders."""
        self.position.close()
        if self._seeding is not None:
            self._seeding.close()

    def _seeded(self, loader: Iterable[Any], epoch: int) -> Iterable[Any]:
        """Return the loader that seeds the samples of an epoch, and has only those of this process."""
        return self._share(loader if self._seeding is None else self._seeding.twin_of(loader, epoch))

    def _spared(self, loader: Iterable[Any]) -> contextlib.AbstractContextManager[None]:
        """Return a context in which to start workers: they leave signals to the run if it handles them."""
        return spared_workers(loader) if self.handles_signals else contextlib.nullcontext()
