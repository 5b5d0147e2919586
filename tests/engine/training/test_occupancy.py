"""engine/training/occupancy.py: one use of a trainer at a time."""

import threading
from typing import cast

import pytest

from offloop.engine import TrainerBusyError
from offloop.engine.training.occupancy import Occupancy, RunServices


class FakeRun:
    run_id = "first"

    def __init__(self) -> None:
        self.thread = threading.current_thread()

    def is_current_thread(self) -> bool:
        return threading.current_thread() is self.thread


def run() -> RunServices:
    return cast(RunServices, FakeRun())


def test_a_run_holds_the_trainer_until_it_is_released() -> None:
    occupancy = Occupancy()
    occupancy.claim(run())
    for attempt in (
        occupancy.check_free,
        lambda: occupancy.claim(run()),
        occupancy.use("searching").__enter__,
    ):
        with pytest.raises(TrainerBusyError, match="this trainer has run 'first'"):
            attempt()
    occupancy.release()
    occupancy.claim(run())


def test_another_use_holds_it_for_the_length_of_a_block() -> None:
    occupancy = Occupancy()
    with occupancy.use("evaluating"):
        with pytest.raises(TrainerBusyError, match="this trainer is evaluating"):
            occupancy.claim(run())
        with pytest.raises(TrainerBusyError, match="this trainer is evaluating"), occupancy.use("searching"):
            pass
    occupancy.check_free()


def test_only_one_of_many_threads_gets_it() -> None:
    occupancy, barrier = Occupancy(), threading.Barrier(8)
    won: list[threading.Thread] = []

    def claim() -> None:
        barrier.wait()
        try:
            occupancy.claim(run())
        except TrainerBusyError:
            return
        won.append(threading.current_thread())

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1


def test_the_training_thread_of_the_run_may_ask_for_the_state() -> None:
    occupancy = Occupancy()
    occupancy.claim(run())
    occupancy.check_thread()
    raised: list[BaseException] = []

    def ask() -> None:
        try:
            occupancy.check_thread()
        except TrainerBusyError as error:
            raised.append(error)

    other = threading.Thread(target=ask)
    other.start()
    other.join()
    assert len(raised) == 1 and "in its training thread it works" in str(raised[0])
