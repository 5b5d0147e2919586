"""The usual epoch in one frame: the same steps as `batches` and `train_batch`, without the calls.

Next to half a millisecond of torch, the code and objects of everything else are cold in the processor's caches. A
call that takes 0.1 us by itself then takes about one, and the dozen calls of a step in `loop.py` add 5 % to a step of
0.5 ms. This epoch adds 2 to 3 %, which `free_gradients` saves again (`benchmarks/step_overhead.py`). It is used where
nothing special was asked for (`can_run_fast`), and runs step hooks in the steps that they asked for. A test holds that
both ways give the same weights, events and random states, bit for bit.
"""

import math
import time
from collections.abc import Iterable
from typing import Any, Final

import torch

from offloop.engine.data.batches import limited_length
from offloop.engine.events import NO_METRICS, StepEnd
from offloop.engine.training.learning_rate import largest_lr, rates_by_group
from offloop.engine.training.loop import TrainingLoop
from offloop.engine.training.precision import clip, free_gradients
from offloop.engine.training.step_output import check_loss, checked_samples, checked_weight, read_output

_DONE: Final = object()


def can_run_fast(loop: TrainingLoop) -> bool:
    """Return True where a step is forward, backward and update on the CPU."""
    config = loop.setup.config
    return (
        loop.program.automatic_optimization
        and loop.strategy.world_size == 1
        and config.accumulate_grad_batches == 1
        and config.on_nonfinite != "skip_step"
        and loop.mixed.dtype is None
        and not loop.feed.is_needed
    )


def train_fast_epoch(loop: TrainingLoop, loader: Iterable[Any]) -> None:
    """Train one epoch. Training thread; only where `can_run_fast`."""
    setup, progress, mailbox, window = loop.setup, loop.progress, loop.mailbox, loop.window
    config, reporter, source, position = setup.config, loop.reporter, loop.source, loop.source.position
    training_step, train_metrics, schedules = loop.program.training_step, loop.train_metrics, loop.schedules
    optimizer, run_id, emit_step = setup.first_optimizer, reporter.run_id, loop.host.emit_step
    clip_limit, validate_every, rates = config.gradient_clip_val, config.val_every_n_steps, NO_METRICS
    offset, clock, isfinite, tensor_class = (
        reporter.clock_offset,
        time.perf_counter,
        math.isfinite,
        torch.Tensor,
    )
    means, data_wait, count_samples = reporter.train_means, loop.data_wait, setup.count_samples
    stops_at_nonfinite = setup.looks_at_losses
    hooks, has_hooks, is_hooked = loop.hooks, loop.hooks.any, False
    limit = config.limit_train_batches
    if isinstance(limit, float):
        limit = limited_length(loader, limit, "limit_train_batches")
    may_end = setup.limits.may_end_in_epoch
    if loop.is_time_to_leave():
        # The loader is not asked: making an iterator draws a random number and starts workers
        position.is_cut = True
        return
    iterator, given = loop.begin_loader(loader)
    current, is_over = position.current, False
    while True:
        if mailbox.attention:
            loop.boundary.process_commands()
            # A command may have changed anything
            optimizer = setup.first_optimizer
            if not given:
                position.drawn_before_first_batch()
        if ((may_end or progress.ending is not None) and loop.is_time_to_leave()) or given == limit:
            break
        asked = clock()
        batch = next(iterator, _DONE)
        if batch is _DONE:
            is_over = True
            break
        got = clock()
        given += 1
        # In the first epoch
        if data_wait is not None:
            if not data_wait.since:
                data_wait.begin(got - asked, got, loop.seconds_aside())
            else:
                data_wait.batches += 1
                data_wait.rest += got - asked
        progress.batch = number = progress.batch + 1
        progress.epoch_batches += 1

        # Forward, backward, update
        if has_hooks and (is_hooked := hooks.begin_step(progress.step + 1)):
            window.begin(1, got)
            window.data_time = got - asked
            hooks.run("before_batch", batch)
            hooks.run("before_forward", batch)
        # Counted first, because the step may take the batch apart
        samples = count_samples(batch)
        output = training_step(batch)
        if type(output) is dict:
            loss, weight = output.get("loss"), output.get("weight")
            if weight is not None:
                weight = checked_weight(weight, "training_step")
            if "samples" in output:
                samples = checked_samples(output["samples"], "training_step")
        elif isinstance(output, tensor_class):
            loss, weight = output, None
        else:
            loss, _, _, weight, own_samples = read_output(output, "training_step")
            samples = samples if own_samples is None else own_samples
        if loss is None or not loop.is_loss_checked:
            check_loss(loss)
            loop.is_loss_checked = True
        assert loss is not None
        # Host sync, free on CPU
        value = loss.item()
        if stops_at_nonfinite and not isfinite(value):
            # Before it changes the weights
            reporter.complain(value, progress.step + 1)
        if train_metrics is not None:
            _, outputs, targets, _, _ = read_output(output, "training_step")
            train_metrics.add(outputs, targets, "training_step")
        if is_hooked:
            window.losses.append(loss)
            hooks.run("before_backward", batch)
        loss.backward()
        if is_hooked:
            hooks.run("after_backward", batch)
            hooks.run("before_optimizer_step", batch)
        norm = None
        if clip_limit is not None:
            norm = clip(loop.parameters(), clip_limit, config.gradient_clip_algorithm)
        # Looked up in every step: load_state_dict replaces the groups
        groups = optimizer.param_groups
        lr = groups[0]["lr"]
        if type(lr) is not float or len(groups) > 1:
            lr = largest_lr(optimizer)
            rates = rates_by_group(setup.optimizers)
        optimizer.step()
        progress.step = step = progress.step + 1
        if schedules.all:
            schedules.step(())
        if is_hooked:
            hooks.run("after_step", batch)
        free_gradients(optimizer)

        # Publish it
        progress.last_lr = lr
        if window.fresh or rates:
            if not is_hooked:
                window.begin(1, got)
                window.data_time = got - asked
                window.losses.append(loss)
            window.weight = samples if weight is None else weight
            window.weights.append(window.weight)
            window.factors.append(1.0)
            window.samples = samples
            progress.last_rates = rates
            reporter.step(window, norm=norm, scale=None, skipped=False)
            window.clear()
        else:
            progress.epoch_samples += samples
            if isfinite(value) or reporter.complain(value, step):
                loss_weight = samples if weight is None else weight
                sums, weights = means.sums, means.weights
                sums["loss"] = sums.get("loss", 0.0) + value * loss_weight
                weights["loss"] = weights.get("loss", 0.0) + loss_weight
            now = clock()
            emit_step(
                StepEnd(
                    run_id=run_id,
                    time=offset + now,
                    epoch=progress.epoch,
                    step=step,
                    batch=number,
                    loss=value,
                    lr=lr,
                    # Host sync, free on CPU
                    grad_norm=None if norm is None else norm.item(),
                    samples=samples,
                    data_time=got - asked,
                    step_time=now - got,
                )
            )
            if is_hooked:
                window.clear()
        if validate_every is not None and step % validate_every == 0:
            loop.validate_after_step()
            # So may a decider
            optimizer = setup.first_optimizer
    if progress.ending is not None:
        source.leave(iterator, in_training=True)
    length = limited_length(loader, config.limit_train_batches, "limit_train_batches")
    is_at_length = given == length and progress.ending == "limit"
    current.is_done = is_over or given == limit or (is_at_length and source.has_no_more(iterator))
