"""Scenarios: rank 1 fails, each in its own way, in its sixth step."""

import os
import signal
import threading
from typing import Any

from rank_scripts.parts import Classifier, adam, loader, net, samples
from rank_scripts.talk import RANK, say

from offloop.engine import Callback, decides, in_step


class Failing(Classifier):
    """A trainer whose rank 1 fails in a step."""

    how = ""

    def training_step(self, batch: Any) -> Any:
        if RANK == 1 and len(vars(self).get("seen", [])) == 5:
            fail(self.how)
        return super().training_step(batch)


def fail(how: str) -> None:
    """Fail as the name says."""
    if how == "raise":
        raise ValueError("the sample is odd")
    if how == "hang":
        say("hanging")
        threading.Event().wait()
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stop":
        say("stopping")
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "exit":
        os._exit(3)


def _fail(how: str, *, workers: int = 0, rank_timeout: float = 20.0, callbacks: Any = ()) -> None:
    Failing.how = how
    model = net()
    trainer = Failing(
        model,
        adam(model),
        device="cpu",
        rank_timeout=rank_timeout,
        run_dir=os.environ["OFFLOOP_TEST_RUNS"],
        run_name=f"fails-{how}",
    )
    trainer.train(loader(samples(800), num_workers=workers), epochs=3, callbacks=list(callbacks))


def raising() -> None:
    """A step raises."""
    _fail("raise")


def hanging() -> None:
    """A step never returns."""
    _fail("hang", rank_timeout=3.0)


def killed() -> None:
    """The kernel kills a rank; loader workers of the others hold its sockets' ends."""
    _fail("kill", workers=1)


def stopped() -> None:
    """A rank says nothing any more."""
    _fail("stop", rank_timeout=3.0)


class RaisingDecider(Callback):
    """A decider that raises, on rank 0 alone."""

    @decides
    def on_epoch_end(self, event: Any, run: Any) -> None:
        raise LookupError("no such service")


class RaisingHook(Callback):
    """A step hook that raises on rank 1 alone."""

    @in_step
    def after_step(self, point: Any) -> None:
        if RANK == 1 and point.step == 4:
            raise LookupError("no such tensor")


def raising_decider() -> None:
    """A decider of rank 0 raises while the others wait for it."""
    _fail("", callbacks=[RaisingDecider()])


def raising_hook() -> None:
    """A step hook of one rank raises."""
    _fail("", callbacks=[RaisingHook()])
