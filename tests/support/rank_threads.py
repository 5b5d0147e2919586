"""Ranks in threads of one process: one runs at a time, with random states of its own, until it waits for the others."""

import random
import threading
from collections.abc import Callable
from typing import Any, Final

import numpy
import torch

from offloop.engine.data.batch_size import guess_batch_size
from offloop.engine.data.random_state import capture_on_host, kept_on_host, restore_on_host
from offloop.engine.distributed.shares import Mode, Shares

PATIENCE: Final = 60.0
"""Seconds for a rank to wait for the others."""


class Rank:
    """A rank in a thread. It has the generators to itself until it waits in `gather`."""

    def __init__(self, number: int, world: "World") -> None:
        self.number = number
        self.world = world

    def gather(self, own: Any) -> list[Any]:
        world = self.world
        world.values[self.number] = own
        state = capture_on_host()
        world.turn.release()
        try:
            world.barrier.wait(PATIENCE)
            found = list(world.values)
            world.barrier.wait(PATIENCE)
        finally:
            world.turn.acquire()
        restore_on_host(state)
        if self.number == 0:
            world.gathers += 1
        return found

    def shares(self, mode: Mode = "split") -> Shares:
        return Shares(
            self.number,
            self.world.size,
            mode,
            gather=self.gather,
            gather_objects=self.gather,
            count_samples=guess_batch_size,
        )


class World:
    """Several ranks."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.turn = threading.Lock()
        self.barrier = threading.Barrier(size)
        self.values: list[Any] = [None] * size
        self.gathers = 0

    def run(self, act: Callable[[Rank], Any]) -> list[Any]:
        """Return what each rank returns; raise what the first of them raises."""
        results: list[Any] = [None] * self.size
        errors: list[BaseException | None] = [None] * self.size

        def body(number: int) -> None:
            with self.turn:
                seed(100 + number)
                try:
                    results[number] = act(Rank(number, self))
                except BaseException as error:
                    errors[number] = error
                    self.barrier.abort()

        threads = [threading.Thread(target=body, args=(number,)) for number in range(self.size)]
        with kept_on_host():
            for each in threads:
                each.start()
            for each in threads:
                each.join(2 * PATIENCE)
        for error in errors:
            if error is not None and not isinstance(error, threading.BrokenBarrierError):
                raise error
        return results


def seed(number: int) -> None:
    """Seed the global generators."""
    torch.manual_seed(number)
    random.seed(number)
    numpy.random.seed(number)
