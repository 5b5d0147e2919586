"""docs/design.md names the files that a batch, an event and a command visit; here they are followed."""

import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Final

import anyio
import pytest
import torch

import offloop.engine
from offloop.engine import Callback, EpochEnd, Run, StepEnd, Trainer
from offloop.engine.bus.subscribers import Subscribers
from offloop.engine.testing import tiny_batches, tiny_model, tiny_trainer
from offloop.engine.training.boundary import Boundary
from offloop.engine.training.loop import TrainingLoop

ENGINE: Final = Path(offloop.engine.__file__).resolve().parent
PAGE: Final = Path(__file__).parent.parent / "docs" / "design.md"


def listed(start: str) -> list[str]:
    """Return the files of the numbered list that follows a line of the page."""
    text = (
        PAGE.read_text(encoding="utf-8").partition(f"\n{start}")[2].partition("\n\n")[2].partition("\n\n")[0]
    )
    return re.findall(r"^\d+\. `([\w/]+\.py)`", text, re.MULTILINE)


class Trace:
    """Notes the files of the engine in the order of their first call, while it is on."""

    def __init__(self) -> None:
        self.is_on = False
        # Both threads run at once, so only the order within each is certain
        self.of_event_loop: list[str] = []
        self.of_training: list[str] = []
        self.begin_at: CodeType | None = None
        """Turned on by the first call of this code that `begins` is true of."""
        self.begins: Callable[[FrameType], bool] = lambda frame: True
        self.begins_on_event_loop: Callable[[FrameType], bool] = lambda frame: True
        """True of the first call on the event loop that is noted: it may still be at work for something earlier."""
        self._is_on_there = False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event != "call":
            return
        if frame.f_code is self.begin_at and self.begins(frame):
            self.is_on, self.begin_at = True, None
        if self.is_on:
            path = Path(frame.f_code.co_filename)
            if "offloop" in path.parts or "engine" in path.parts:
                path = path.resolve()
                if path.is_relative_to(ENGINE):
                    name = path.relative_to(ENGINE).as_posix()
                    if threading.current_thread() is not threading.main_thread():
                        files = self.of_training
                    else:
                        self._is_on_there = self._is_on_there or self.begins_on_event_loop(frame)
                        files = self.of_event_loop if self._is_on_there else []
                    if name not in files:
                        files.append(name)

    def __enter__(self) -> "Trace":
        threading.setprofile(self)
        sys.setprofile(self)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)


def follows(visited: list[str], files: list[str]) -> None:
    assert files and len(set(files)) == len(files), "no file twice"
    assert [name for name in visited if name in files] == files


def test_a_batch_visits_the_files_in_the_order_of_the_page() -> None:
    trace = Trace()
    # A generator: each batch is a call of it
    trace.begin_at = TrainingLoop.batches.__code__
    trace.begins = lambda frame: frame.f_locals.get("given") == 2
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(
        model,
        optimizer,
        loss=torch.nn.functional.cross_entropy,
        device="cpu",
        gradient_clip_val=1.0,
        # Call by call, not in one frame
        accumulate_grad_batches=1,
        on_nonfinite="skip_step",
        channels_last=True,
        scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer),
        scheduler_interval="step",
    )
    with trace:
        trainer.train(tiny_batches(24), max_steps=3)
    follows(trace.of_training, listed("A batch"))


def hands_over_epoch_end(frame: FrameType) -> bool:
    """Return whether the drainer gives the subscribers events among which is an `EpochEnd`."""
    if frame.f_code is not Subscribers.hand_over.__code__:
        return False
    lists = [each for each in frame.f_locals.values() if isinstance(each, list)]
    return any(isinstance(event, EpochEnd) for each in lists for event in each)


@pytest.mark.anyio
async def test_an_event_visits_the_files_in_the_order_of_the_page() -> None:
    trace, handled = Trace(), anyio.Event()

    class Watches(Callback):
        async def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
            if trace.is_on:
                trace.is_on = False
                handled.set()

    # The epoch's last batch waits until the event loop has nothing more to deliver
    batches, is_quiet = tiny_batches(8), threading.Event()

    class Gated:
        def __iter__(self) -> Iterator[Any]:
            yield batches[0]
            is_quiet.wait(60)

    with trace:
        async with tiny_trainer().start(Gated(), epochs=1, callbacks=[Watches()]) as run:
            async for _ in run.events(StepEnd):
                break
            trace.begins = lambda frame: isinstance(frame.f_locals.get("event"), EpochEnd)
            trace.begin_at = Boundary.announce.__code__
            trace.begins_on_event_loop = hands_over_epoch_end
            is_quiet.set()
            with anyio.fail_after(60):
                await handled.wait()
    files = listed("An event")
    turn = files.index("bus/event_bus.py")
    follows(trace.of_training, files[: turn + 1])
    follows(trace.of_event_loop, files[turn + 1 :])


@pytest.mark.anyio
async def test_a_command_visits_the_files_in_the_order_of_the_page() -> None:
    trace = Trace()
    trainer = tiny_trainer()
    with trace:
        async with trainer.start(tiny_batches(8), epochs=1_000_000) as run:
            async for event in run.events(StepEnd):
                if event.step > 20:
                    break
            await run.pause()
            trace.is_on = True
            with anyio.fail_after(60):
                await run.set_lr(0.5)
            trace.is_on = False
            await run.stop()
    files = listed("A command")
    turn = files.index("bus/command_mailbox.py")
    follows(trace.of_event_loop, files[: turn + 1])
    follows(trace.of_training, files[turn + 1 :])
