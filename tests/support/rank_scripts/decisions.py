"""Scenarios: whatever decides, all ranks are at the same step with the same weights."""

import threading
import time
from typing import Any

import torch
from rank_scripts.parts import adam, classifier, loader, net, samples, train
from rank_scripts.talk import RANK

from offloop.callbacks import EarlyStopping, LearningRateScheduler
from offloop.engine import (
    Callback,
    CommandApplied,
    ConfigError,
    EpochEnd,
    Run,
    StateChanged,
    StepEnd,
    decides,
    in_step,
)
from offloop.engine.testing import Recorder


class Slowly(Callback):
    """Holds each step a little, on all ranks alike, so that commands come while there are steps left."""

    def __init__(self, seconds: float = 0.002) -> None:
        self.seconds = seconds

    @in_step
    def after_step(self, point: Any) -> None:
        time.sleep(self.seconds)


def _applied(recorder: Recorder) -> list[Any]:
    return [[each.command, each.step, each.by, each.error] for each in recorder.of(CommandApplied)]


def endless() -> Any:
    """Return a loader of many batches."""
    return loader(samples(8 * 400))


def early_stopping() -> Any:
    """A decider of a callback stops all ranks."""
    model = net()
    trainer = classifier(model, torch.optim.SGD(model.parameters(), lr=1e-12))
    return train(
        trainer,
        loader(samples(64)),
        loader(samples(19, seed=1)),
        epochs=50,
        callbacks=[EarlyStopping("val_loss", patience=2, min_delta=0.1)],
    )


def stop_by_observer() -> Any:
    """An observer on rank 0 stops the run at some step."""
    commands = Recorder()

    class Stop(Callback):
        async def on_step_end(self, event: StepEnd, run: Run) -> None:
            if event.step == 20:
                run.stop_nowait("enough")

    found = train(classifier(), endless(), epochs=5, callbacks=[Stop(), Slowly(), commands])
    return {**found, "applied": _applied(commands)}


def stop_by_step_of_rank_1() -> Any:
    """The step of one rank stops the run: all stop at the same step."""

    class Odd(type(classifier())):  # type: ignore[misc]
        def training_step(self, batch: Any) -> Any:
            if RANK == 1 and len(vars(self).get("seen", [])) == 11:
                self.stop("rank 1 has enough")
            return super().training_step(batch)

    model = net()
    trainer = Odd(model, adam(model), device="cpu")
    return train(trainer, endless(), epochs=5, callbacks=[Slowly()])


def stop_everywhere() -> Any:
    """All ranks stop with the same words, as a script does that counts: it is one stop, at one step."""
    commands = Recorder()

    class Counting(type(classifier())):  # type: ignore[misc]
        def training_step(self, batch: Any) -> Any:
            if len(vars(self).get("seen", [])) == 11:
                self.stop("enough")
            return super().training_step(batch)

    model = net()
    trainer = Counting(model, adam(model), device="cpu")
    found = train(trainer, endless(), epochs=5, callbacks=[Slowly(), commands])
    return {**found, "applied": _applied(commands)}


def set_lr() -> Any:
    """A decider and an observer of rank 0 set rates: every rank has them from the same step on."""
    commands = Recorder()

    class Decide(Callback):
        @decides
        def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
            if event.epoch == 0:
                run.set_lr_nowait(0.5)

    class Watch(Callback):
        async def on_step_end(self, event: StepEnd, run: Run) -> None:
            if event.step == 30:
                run.set_lr_nowait(0.001)

    found = train(
        classifier(), loader(samples(160)), epochs=6, callbacks=[Decide(), Watch(), Slowly(), commands]
    )
    return {**found, "applied": _applied(commands)}


def pause_and_resume() -> Any:
    """A pause on rank 0 holds all; the others wait under no time-out of a collective."""
    states = Recorder()

    class Pause(Callback):
        async def on_step_end(self, event: StepEnd, run: Run) -> None:
            if event.step == 10:
                run.pause_nowait("a look")

        async def on_state_changed(self, event: StateChanged, run: Run) -> None:
            if event.state == "paused":
                # Longer than what a rank may be late
                threading.Timer(1.5, run.resume_nowait).start()

    found = train(
        classifier(rank_timeout=1.0), loader(samples(320)), epochs=2, callbacks=[Pause(), Slowly(), states]
    )
    return {
        **found,
        "applied": _applied(states),
        "states": [each.state for each in states.of(StateChanged)],
    }


def stop_in_a_pause() -> Any:
    """A stop ends a pause on all ranks."""

    class Pause(Callback):
        async def on_step_end(self, event: StepEnd, run: Run) -> None:
            if event.step == 10:
                run.pause_nowait()

        async def on_state_changed(self, event: StateChanged, run: Run) -> None:
            if event.state == "paused":
                run.stop_nowait("out of a pause")

    return train(classifier(), endless(), epochs=2, callbacks=[Pause(), Slowly()])


def slow_decider() -> Any:
    """A decider of rank 0 takes longer than a rank may be late."""

    class Slow(Callback):
        @decides
        async def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
            import anyio

            await anyio.sleep(1.5)
            run.set_lr_nowait(0.25)

    return train(classifier(rank_timeout=1.0), loader(samples(32)), epochs=2, callbacks=[Slow()])


def max_time() -> Any:
    """Time by rank 0's clock ends the run, at the same step everywhere."""
    return train(classifier(), endless(), max_time=0.4, callbacks=[Slowly(0.001 + 0.003 * RANK)])


def max_steps() -> Any:
    """A limit in the middle of an epoch."""
    return train(classifier(), loader(samples(104)), loader(samples(11, seed=1)), max_steps=17)


def commands() -> Any:
    """Call, validation and checkpoint, given by rank 0; the others take part."""
    recorder = Recorder()
    said: list[Any] = []

    class Give(Callback):
        needs_run_dir = True

        async def on_step_end(self, event: StepEnd, run: Run) -> None:
            if event.step == 10:
                said.append(await run.call(lambda trainer: trainer.rank))
                metrics = await run.validate()
                said.append(sorted(metrics or {}))
                saved = await run.checkpoint("manual")
                said.append(saved is not None and saved.reason)
                run.stop_nowait("all given")

    import os

    found = train(
        classifier(run_dir=os.environ["OFFLOOP_TEST_RUNS"], run_name="commands"),
        endless(),
        loader(samples(27, seed=1)),
        epochs=10,
        callbacks=[Give(), Slowly(), recorder],
    )
    return {**found, "applied": _applied(recorder), "said": said}


def cancel() -> Any:
    """Rank 0's program cancels: all ranks leave."""

    class Cancel(Callback):
        async def on_step_end(self, event: StepEnd, run: Run) -> None:
            if event.step == 10:
                run.cancel("no longer wanted")

    return train(classifier(), endless(), epochs=10, callbacks=[Cancel(), Slowly()])


def schedules() -> Any:
    """Schedules by step, by epoch and by a metric."""
    found = {}
    model = net()
    optimizer = adam(model)
    by_step = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=26)
    trainer = classifier(model, optimizer, scheduler=by_step, scheduler_interval="step")
    found["by_step"] = train(trainer, loader(samples(104)), epochs=2)

    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
    trainer = classifier(model, optimizer, scheduler=plateau)
    found["plateau"] = train(trainer, loader(samples(104)), loader(samples(13, seed=1)), epochs=4)

    callback = LearningRateScheduler("cosine", warmup=5)
    found["callback"] = train(classifier(), loader(samples(104)), epochs=2, callbacks=[callback])
    return found


def nonfinite() -> Any:
    """A loss of one rank that is not finite ends the run on all of them; a skipped step is skipped by all."""

    class Odd(type(classifier())):  # type: ignore[misc]
        def training_step(self, batch: Any) -> Any:
            output = super().training_step(batch)
            if RANK == 1 and len(self.seen) == 7:
                output["loss"] = output["loss"] * float("nan")
            return output

    model = net()
    skipping = train(
        Odd(model, adam(model), device="cpu", on_nonfinite="skip_step"), loader(samples(104)), epochs=1
    )
    model = net()
    raised: list[str] = []
    try:
        train(Odd(model, adam(model), device="cpu"), endless(), epochs=3, callbacks=[Slowly()])
    except Exception as error:
        raised = [type(error).__name__, str(error)]
    return {**skipping, "raised": raised}


def full_subscriber() -> Any:
    """A subscriber of rank 0 with the right to slow training down does so, and training goes on."""
    import anyio

    taken: list[int] = []

    class Slow(type(classifier())):  # type: ignore[misc]
        def validation_step(self, batch: Any) -> Any:
            # Longer than between two looks of a rank at the store
            time.sleep(0.12)
            return super().validation_step(batch)

    async def main() -> Any:
        model = net()
        trainer = Slow(model, adam(model), device="cpu")
        async with trainer.start(loader(samples(104)), loader(samples(40)), epochs=2) as run:
            if RANK == 0:
                async for step in run.events(StepEnd, buffer=1, on_full="block"):
                    taken.append(step.step)
                    await anyio.sleep(0.005)
        return run.result

    return {"status": anyio.run(main).status, "taken": taken}


def hook_of_one_rank() -> Any:
    """A step hook that may fail does so on one rank alone."""

    class Fails(Callback):
        on_error = "isolate"

        @in_step
        def after_step(self, point: Any) -> None:
            if RANK == 1 and point.step == 5:
                raise ValueError("only here")

    raised = ""
    try:
        train(classifier(), loader(samples(104)), epochs=2, callbacks=[Fails()])
    except Exception as error:
        raised = str(error)
    return {"raised": raised}


def cancelled_start() -> Any:
    """The task that starts a run is cancelled on rank 1, which waits for rank 0; then all ranks start another one."""
    import anyio

    raised: list[str] = []

    async def main() -> Any:
        if RANK == 1:
            with anyio.move_on_after(0.3) as scope:
                await classifier().train_async(loader(samples(16)), epochs=1)
            raised.append("cancelled" if scope.cancelled_caught else "not cancelled")
            # Its thread waits for rank 0 yet
            await anyio.sleep(2.5)
        else:
            await anyio.sleep(1.0)
            try:
                await classifier().train_async(loader(samples(16)), epochs=1)
            except ConfigError as error:
                raised.append(str(error))
        return await classifier().train_async(loader(samples(16)), epochs=1)

    return {"status": anyio.run(main).status, "raised": raised}
