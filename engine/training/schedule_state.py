"""Restoring a learning rate schedule, where the script may have another one than the checkpoint.

The state of a schedule and its settings come from the checkpoint, except its length, which comes from the script. A
schedule over the length of the run must follow when the run is made longer: a cosine that is over would climb back to
its full rate.
"""

from bisect import bisect_right
from collections.abc import Mapping
from typing import Any, Final

from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, PolynomialLR, SequentialLR

from offloop.engine.position.exactness import ResumeReport

LENGTHS: Final[Mapping[type, str]] = {
    CosineAnnealingLR: "T_max",
    LinearLR: "total_iters",
    PolynomialLR: "total_iters",
}
"""The attribute that holds the length. `OneCycleLR` is refused at another length, see `check_length`."""

_STATE: Final = frozenset({"last_epoch", "base_lrs", "optimizer"})
"""Attributes of schedules that are no settings; private attributes are none either."""


def settings_of(scheduler: LRScheduler) -> dict[str, Any]:
    """Return the arguments of a new schedule, as far as they are numbers and strings."""
    found: dict[str, Any] = {}
    for name, value in vars(scheduler).items():
        if name == "_schedulers":
            for index, inner in enumerate(value):
                found |= {f"{index}.{key}": each for key, each in settings_of(inner).items()}
        elif name == "lr_lambdas":
            for index, function in enumerate(value):
                found |= _plain(getattr(function, "__dict__", {}), f"lr_lambda {index}: ")
        elif name not in _STATE and (not name.startswith("_") or name == "_milestones"):
            found |= _plain({name: value}, "")
    return found


def _plain(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {
        f"{prefix}{name}": list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if isinstance(value, bool | int | float | str)
        or (isinstance(value, list | tuple) and all(isinstance(each, int | float) for each in value))
    }


def restore_schedule(
    scheduler: LRScheduler, saved: Mapping[str, Any], made: Mapping[str, Any] | None, report: ResumeReport
) -> bool:
    """Load a saved state into the script's schedule, which keeps its own length.

    Args:
        scheduler: The script's.
        saved: State of the schedule in the checkpoint.
        made: `settings_of` that schedule when it was new; None if unknown.
        report: Records which settings come from the checkpoint and which from the script.

    Returns:
        True if the rates of its optimizer must be recomputed by `follow_length`.
    """
    name = type(scheduler).__name__
    now = settings_of(scheduler)
    lengths = {each: getattr(each, key) for each, key in _lengths(scheduler)}
    scheduler.load_state_dict(dict(saved))
    made = now if made is None else made
    for key in sorted(now.keys() | made.keys()):
        if now.get(key) != made.get(key) and key.rpartition(".")[2] not in LENGTHS.values():
            report.keep(f"{key.lstrip('_')} of {name} is {made.get(key)}, the script has {now.get(key)}")
    has_changed = False
    for inner, key in _lengths(scheduler):
        before, length = getattr(inner, key), lengths[inner]
        if before != length:
            setattr(inner, key, length)
            has_changed = has_changed or 0 < inner.last_epoch < max(before, length)
            text = f"{type(inner).__name__} continues over {key}={length}, before it was {before}"
            report.take(text)
            report.lower("approximate", text)
    return has_changed


def follow_length(scheduler: LRScheduler) -> None:
    """Set the rates to those of the current step of a schedule whose length has changed."""
    active: Any = scheduler
    while isinstance(active, SequentialLR):
        index = bisect_right(active._milestones, active.last_epoch)
        active = active._schedulers[index]
    # A chain of several schedules continues from the rates that it had
    if type(active) not in LENGTHS:
        return
    rates = active._get_closed_form_lr()
    for group, rate in zip(active.optimizer.param_groups, rates, strict=False):
        if hasattr(group["lr"], "fill_"):
            # A tensor, for a capturable optimizer
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    scheduler._last_lr = active._last_lr = list(rates)


def _lengths(scheduler: Any) -> list[tuple[Any, str]]:
    """Return the schedules that have a length, nested ones too, with the attribute that holds it."""
    found = [(scheduler, LENGTHS[type(scheduler)])] if type(scheduler) in LENGTHS else []
    for inner in getattr(scheduler, "_schedulers", ()):
        found += _lengths(inner)
    return found
