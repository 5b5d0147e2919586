"""The usual epoch, written out in one frame: the same steps as `batches` and `train_batch`, without the calls.

Beside half a millisecond of torch, the code and the objects of everything else are cold in the processor's
caches, so a call that costs 0.1 us by itself costs about one; the dozen calls of a step in `loop.py` add 5 % to
a step of 0.5 ms, this adds 2 to 3, which `free_gradients` makes up for (`benchmarks/step_overhead.py`). It
serves where nothing special was asked for (`is_plain`), and runs step hooks in the steps that they asked for. A
test holds that both ways give the same weights, events and random states, bit for bit.
"""

import math
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

import torch

from offloop.engine.data.batches import limited_length
from offloop.engine.events import NO_METRICS, StepEnd
from offloop.engine.training.learning_rate import largest_lr, rates_by_group
from offloop.engine.training.precision import clip, free_gradients

if TYPE_CHECKING:
    from offloop.engine.training.loop import TrainingLoop

_DONE: Final = object()


def is_plain(loop: "TrainingLoop") -> bool:
    """True where a step is forward, backward, update on the CPU."""
    config = loop.config
    return (
        loop.program.automatic_optimization
        and config.accumulate_grad_batches == 1
        and config.on_nonfinite != "skip_step"
        and loop.mixed.dtype is None
        and not loop.feed.is_needed
    )


def train_plain_epoch(loop: "TrainingLoop", loader: Iterable[Any]) -> None:
    """Train one epoch. Training thread; only where `is_plain`."""
    # Here, since loop.py is what calls us
    from offloop.engine.training.loop import check_loss, checked_samples, checked_weight, read_output

    config, mailbox, reporter, window = loop.config, loop.mailbox, loop.reporter, loop.window
    training_step, train_metrics, schedules = loop.program.training_step, loop.train_metrics, loop.schedules
    optimizer, run_id, publish_step = loop.first_optimizer, loop.run_id, loop.publish_step
    clip_limit, validate_every, rates = config.gradient_clip_val, config.val_every_n_steps, NO_METRICS
    offset, clock, isfinite, tensor_class = (
        reporter.clock_offset,
        time.perf_counter,
        math.isfinite,
        torch.Tensor,
    )
    means, data_wait, count_samples = reporter.train_means, loop.data_wait, loop.count_samples
    stops_at_nonfinite = loop.looks_at_losses
    hooks, has_hooks, is_looked_into = loop.hooks, loop.hooks.any, False
    limit = config.limit_train_batches
    if isinstance(limit, float):
        limit = limited_length(loader, limit, "limit_train_batches")
    may_end = loop.limits.max_steps is not None or loop.limits.max_time is not None
    if loop.is_time_to_leave():
        loop.data.is_cut = True
        return  # without asking the loader: making an iterator draws a random number and starts workers
    iterator, given = loop.begin_loader(loader)
    current, is_over = loop.data.current, False
    while True:
        if mailbox.attention:
            loop.boundary.process_commands()
            optimizer = loop.first_optimizer  # commands may change anything
            if not given:
                loop.data.drawn_before_first_batch()
        if ((may_end or loop.ending is not None) and loop.is_time_to_leave()) or given == limit:
            break
        asked = clock()
        batch = next(iterator, _DONE)
        if batch is _DONE:
            is_over = True
            break
        got = clock()
        given += 1
        if data_wait is not None:  # in the first epoch
            if not data_wait.since:
                data_wait.begin(got - asked, got, loop.set_aside())
            else:
                data_wait.batches += 1
                data_wait.rest += got - asked
        loop.batch = number = loop.batch + 1
        loop.epoch_batches += 1

        # Forward, backward, update
        if has_hooks and (is_looked_into := hooks.begin_step(loop.step + 1)):
            window.begin(1, got)
            window.data_time = got - asked
            hooks.run("before_batch", batch)
            hooks.run("before_forward", batch)
        samples = count_samples(batch)  # now: the step may take the batch apart
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
        if loss is None or not loop.loss_checked:
            check_loss(loss)
            loop.loss_checked = True
        assert loss is not None
        value = loss.item()  # host sync, free on CPU
        if stops_at_nonfinite and not isfinite(value):
            reporter.complain(value, loop.step + 1)  # before it changes the weights
        if train_metrics is not None:
            _, outputs, targets, _, _ = read_output(output, "training_step")
            train_metrics.add(outputs, targets, "training_step")
        if is_looked_into:
            window.losses.append(loss)
            hooks.run("before_backward", batch)
        loss.backward()
        if is_looked_into:
            hooks.run("after_backward", batch)
            hooks.run("before_optimizer_step", batch)
        norm = None
        if clip_limit is not None:
            norm = clip(loop.parameters, clip_limit, config.gradient_clip_algorithm)
        groups = optimizer.param_groups  # others after a load_state_dict
        lr = groups[0]["lr"]
        if type(lr) is not float or len(groups) > 1:
            lr = largest_lr(optimizer)
            rates = rates_by_group(loop.optimizers)
        optimizer.step()
        loop.step = step = loop.step + 1
        if schedules:
            loop.step_schedules()
        loop.epoch_samples += samples
        if is_looked_into:
            hooks.run("after_step", batch)
        free_gradients(optimizer)

        # Say so
        loop.last_lr = lr
        if window.fresh or rates:
            if not is_looked_into:
                window.begin(1, got)
                window.data_time = got - asked
                window.losses.append(loss)
            window.weight = samples if weight is None else weight
            window.weights.append(window.weight)
            window.samples = samples
            position = (run_id, loop.epoch, step, number)
            reporter.step(window, position=position, lr=lr, rates=rates, norm=norm, scale=None, skipped=False)
            window.clear()
        else:
            if isfinite(value) or reporter.complain(value, step):
                counted = samples if weight is None else weight
                sums, weights = means.sums, means.weights
                sums["loss"] = sums.get("loss", 0.0) + value * counted
                weights["loss"] = weights.get("loss", 0.0) + counted
            now = clock()
            publish_step(
                StepEnd(
                    run_id=run_id,
                    time=offset + now,
                    epoch=loop.epoch,
                    step=step,
                    batch=number,
                    loss=value,
                    lr=lr,
                    grad_norm=None if norm is None else norm.item(),  # host sync, free on CPU
                    samples=samples,
                    data_time=got - asked,
                    step_time=now - got,
                )
            )
            if is_looked_into:
                window.clear()
        if validate_every is not None and step % validate_every == 0:
            loop.validate_after_step()
            optimizer = loop.first_optimizer  # and so may deciders
    if loop.ending is not None:
        loop.left.append(iterator)
        loop.data.leave_epoch()
    length = limited_length(loader, config.limit_train_batches, "limit_train_batches")
    current.is_done = is_over or given == limit or (given == length and loop.is_at_end(iterator))
