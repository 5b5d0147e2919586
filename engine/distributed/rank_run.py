"""RankRun: one run of several ranks, as this rank sees it, from the store to the goodbye."""

import contextlib
import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from offloop.engine.bus.command_mailbox import Mailbox
from offloop.engine.config import TrainerConfig
from offloop.engine.distributed import group
from offloop.engine.distributed.ddp import DDPStrategy
from offloop.engine.distributed.group import Group
from offloop.engine.distributed.launch import Launch, find_launch
from offloop.engine.distributed.news import News
from offloop.engine.distributed.plan import PATIENCE, Plan
from offloop.engine.distributed.rank_log import OneVoice, RankLog
from offloop.engine.distributed.rank_mailbox import RankMailbox
from offloop.engine.distributed.rank_strategy import RunHere
from offloop.engine.distributed.rendezvous import POLL, PrefixStore, Store, connect, shared_client
from offloop.engine.distributed.signs_of_life import SignsOfLife
from offloop.engine.errors import ConfigError, RankFailedError, describe
from offloop.engine.events import Event, TrainStart
from offloop.engine.training.loop import TrainingLoop
from offloop.engine.training.setup import Program, Setup

# Runs of this process so far. All ranks start their runs in the same order.
_numbers = itertools.count()
# The run in progress: only one thread may call collectives. Any thread; under the lock.
_current: "RankRun | None" = None
_lock = threading.Lock()


class RankRun:
    """One run of several ranks. Threads: as each method says."""

    def __init__(self, launch: Launch, store: Store, number: int) -> None:
        """Take part in a run; see `join_run`."""
        self.launch = launch
        self.rank = launch.rank
        self.world_size = launch.world_size
        self.deciders: frozenset[str] = frozenset()
        """Names of the handlers that rank 0 asks for decisions. Written before the training thread starts."""
        self._store = store
        self._key = f"run/{number}"
        self.plan = Plan(self.client(), launch.rank, launch.world_size)
        # Made before the training thread starts; none for an evaluation
        self.mailbox: RankMailbox | None = None
        self.strategy: DDPStrategy | None = None
        # Made by the training thread, read by the thread that leaves and closes when the training thread has ended
        self.life: SignsOfLife | None = None
        self._log: RankLog | None = None
        self._voice = OneVoice() if launch.rank else None

    @property
    def is_first(self) -> bool:
        """True on rank 0, which has the run's voice."""
        return self.rank == 0

    def client(self) -> Any:
        """Return a client of the store with the keys of this run, for operations that do not wait. Any thread."""
        return PrefixStore(self._key, shared_client(self._store))

    def equip(self, given: Mailbox, program: Program, setup: Setup) -> tuple[RankMailbox, DDPStrategy]:
        """Return mailbox and strategy for the loop of the run.

        Args:
            given: The mailbox of the run.
            program: The trainer.
            setup: Of the run.
        """
        self.mailbox = RankMailbox(given)
        self.strategy = DDPStrategy(self.rank, self.world_size, self.mailbox, program, setup)
        return self.mailbox, self.strategy

    # The training thread -----------------------------------------------------------------------------

    def begin(
        self, config: TrainerConfig, *, fail: Callable[[RankFailedError], None], given: Mailbox
    ) -> None:
        """Give signs of life from now on.

        Args:
            config: Of the trainer.
            fail: Called by a thread of its own when another rank has failed.
            given: The mailbox of the run: it is poked when another rank wants attention.
        """
        self.life = SignsOfLife(
            self._store,
            self.launch,
            self._key,
            timeout=config.rank_timeout,
            fail=fail,
            # From a command or a cancellation until all ranks have it: rank 0 may stand in a pause
            wants_attention=lambda: self.mailbox is not None and self.mailbox.wants_attention,
            attention=given.poke,
        )
        self.life.start()

    def join(self, loop: TrainingLoop, device: torch.device, run: RunHere) -> None:
        """Make the process group, the first time, and give all ranks the weights of rank 0. Waits for all ranks.

        Args:
            loop: Of the run.
            device: Of the model.
            run: The run on this rank.
        """
        assert self.strategy is not None and self.life is not None
        news = News(self.client(), self.rank, self.world_size)
        self.strategy.join(loop, self.group(device), news, self.life, run)

    def group(self, device: torch.device) -> Group:
        """Return the process group; the first time, make it. Waits for all ranks."""
        return group.join(self.launch, self._store, device)

    def decide(self, event: Event, ask: Callable[[Event], None]) -> None:
        """Ask this rank's deciders about an event; the others follow what those of rank 0 have changed.

        Args:
            event: The event.
            ask: Asks the deciders.
        """
        assert self.strategy is not None and self.life is not None
        if event.handler_name not in self.deciders:
            ask(event)
            return
        following = self.strategy.following
        following.watch()
        with self.life.excusing():
            ask(event)
        following.follow()

    def saving(self) -> contextlib.AbstractContextManager[None]:
        """Return a context for taking a checkpoint: rank 0 may wait for a slow disk, and the others for rank 0."""
        assert self.life is not None
        return self.life.excusing()

    def after_deciding(self, event: Event) -> None:
        """Take what deciders have commanded to all ranks."""
        if event.handler_name in self.deciders or isinstance(event, TrainStart):
            assert self.strategy is not None
            self.strategy.agreement.exchange()

    def hook_failed(self, name: str, error: BaseException) -> None:
        """Note that a step hook, which runs on all ranks, has failed on this one, and that the run goes on here."""
        assert self.strategy is not None
        self.strategy.failed_hooks.append((name, describe(error)))

    @property
    def is_held(self) -> bool:
        """True while a full subscriber of rank 0 holds training up."""
        assert self.strategy is not None and self.mailbox is not None
        agreement = self.strategy.agreement
        if self.mailbox.is_in_pass:
            # Without exchanges: rank 0 stands by itself, and the others wait for it at the end of the pass
            return agreement.is_first and agreement.is_held_here()
        return agreement.is_held

    def open_log(self, directory: Path) -> None:
        """Log into the run's directory. After rank 0 has made it."""
        self._log = RankLog(directory, self.rank, self._voice)

    def end_training(self) -> None:
        """Note that the training thread has come out: no failure of another rank ends this process by force now."""
        if self.life is not None:
            self.life.has_come_out = True

    def seed_of(self, seed: int) -> int:
        """Return the seed of this rank: that of the run on rank 0, streams of their own elsewhere."""
        if self.is_first:
            return seed
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(0, 2**62, (self.rank,), generator=generator)
        return int(drawn[-1])

    def explained(self, error: BaseException) -> BaseException:
        """Return what a run failed with: another rank's failure where that has broken a collective here.

        An error of this rank is told to the others. Waits some seconds for what another rank has to say.
        """
        if self.life is not None:
            cause = self.life.cause_of(error)
            if cause is None:
                self.life.report(error)
            elif cause is not error:
                cause.__cause__ = error
                error = cause
        if self._log is not None:
            self._log.failed(error)
        return error

    # The end of the run, in a thread that may block ----------------------------------------------------

    def leave(self, timeout: float, *, unless: Callable[[], bool]) -> None:
        """Leave together with the other ranks: the first process that ends makes torchrun end the others.

        Args:
            timeout: Seconds to wait for them.
            unless: Ends the wait: a rank has failed, or a second signal has come.
        """
        if self.life is None:
            return
        self.life.leave()
        deadline = time.monotonic() + timeout
        while not unless() and time.monotonic() < deadline and not self.life.wait_for_others(POLL):
            pass

    def refuse(self, error: BaseException | None) -> None:
        """Give up a run that was refused as it started, and tell the others why. Any thread; does not block."""
        self.close()
        if self.life is None:

            def tell() -> None:
                life = SignsOfLife(
                    self._store,
                    self.launch,
                    self._key,
                    timeout=20.0,
                    fail=lambda _: None,
                    wants_attention=lambda: False,
                    attention=lambda: None,
                )
                life.start()
                life.report(error or RuntimeError("the run was refused as it started"))
                life.stop()

            # The process waits for it as it ends
            threading.Thread(target=tell, name="offloop-refuse", daemon=False).start()

    def close(self) -> None:
        """Give no more signs of life: the run is over, or was refused. Any thread; calling it twice is fine."""
        global _current
        with _lock:
            if _current is self:
                _current = None
        if self.life is not None:
            self.life.stop()
        if self._log is not None:
            self._log.close()
        if self._voice is not None:
            self._voice.close()

    # Results -----------------------------------------------------------------------------------------

    def publish_result(self, encoded: bytes) -> None:
        """Tell the others the outcome of the run, as rank 0."""
        self.client().set("result", encoded.hex())

    def take_result(self, timeout: float, *, unless: Callable[[], bool]) -> bytes | None:
        """Wait for the outcome that rank 0 tells after its callbacks; None if it tells none. Before `leave`.

        Args:
            timeout: Seconds to wait.
            unless: Ends the wait.
        """
        client, deadline = self.client(), time.monotonic() + timeout
        while not client.check(["result"]):
            if unless() or time.monotonic() > deadline:
                return None
            time.sleep(POLL)
        return bytes.fromhex(client.get("result").decode())


def join_run(config: TrainerConfig) -> RankRun | None:
    """Return the run that this process takes part in as one of several; None if it trains alone. Blocks, for the store.

    Raises:
        ConfigError: `strategy` fits no group, or the variables that tell a process its rank make no sense.
        RankFailedError: A rank did not come.
    """
    launch = find_launch(config.strategy)
    if launch is None:
        return None
    store = connect(launch, timeout=PATIENCE)
    global _current
    with _lock:
        if _current is not None:
            raise ConfigError(
                "a run of several processes is in progress in this process, and there can be one at a time: wait "
                'for its end, or let this one train alone: Trainer(strategy="none")'
            )
        _current = RankRun(launch, store, next(_numbers))
        return _current
