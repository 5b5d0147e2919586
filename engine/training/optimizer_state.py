"""Restoring an optimizer's state, where the script's optimizer may differ from the checkpoint's."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from offloop.engine.errors import ConfigError
from offloop.engine.position.exactness import ResumeReport
from offloop.engine.training.wrappers import bare_name

WEIGHTS_ALONE = "begin a new run with the weights alone: init_from=..."


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Load an optimizer's state with its exact dtypes; torch would cast it to those of the parameters.

    Raises:
        ConfigError: It is the state of another kind of optimizer. torch accepts it and fails in the first step.
        ValueError: The groups have other numbers of parameters.
    """
    # A wrapper may have no defaults
    defaults = getattr(optimizer, "defaults", {})
    settings = [set(defaults) & set(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(dict(saved))
    missing = {
        name
        for known, group in zip(settings, optimizer.param_groups, strict=True)
        for name in known - set(group)
    }
    if missing:
        raise ConfigError(
            f"the state is of another optimizer: {type(optimizer).__name__} needs {', '.join(sorted(missing))}. "
            f"Make the optimizer that it was saved with, or {WEIGHTS_ALONE}"
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in saved["state"].items():
        live = optimizer.state[parameters[int(index)]]
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and live[name].dtype != value.dtype:
                live[name] = value.to(live[name].device).clone()


def parameters_by_name(model: torch.nn.Module, loss: object) -> dict[str, torch.nn.Parameter]:
    """Return the parameters of the model, and of a loss module (`loss:...`), without the prefixes of wrappers.

    A parameter that is in both has its name in the model.
    """
    named = {bare_name(name): parameter for name, parameter in model.named_parameters()}
    if isinstance(loss, torch.nn.Module):
        in_model = {id(parameter) for parameter in named.values()}
        named |= {
            f"loss:{bare_name(name)}": parameter
            for name, parameter in loss.named_parameters()
            if id(parameter) not in in_model
        }
    return named


def parameter_names(
    optimizer: torch.optim.Optimizer, named: Mapping[str, torch.nn.Parameter]
) -> list[list[str]]:
    """Return the names of each group's parameters, by `parameters_by_name`; empty for a parameter of neither."""
    names = {id(parameter): name for name, parameter in named.items()}
    return [
        [names.get(id(parameter), "") for parameter in group["params"]] for group in optimizer.param_groups
    ]


def options_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the options of each group, such as learning rate and momentum, as numbers and strings.

    Making a schedule changes the rate; the rate before that is returned.
    """
    return [
        {
            key: _plain(value)
            for key, value in group.items()
            if key not in ("params", "param_names", "initial_lr")
        }
        | {"lr": _plain(group.get("initial_lr", group["lr"]))}
        for group in optimizer.param_groups
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    saved: Mapping[str, Any],
    *,
    label: str,
    names: Sequence[Sequence[str]] | None,
    made: Sequence[Mapping[str, Any]] | None,
    named: Mapping[str, torch.nn.Parameter],
    report: ResumeReport,
) -> None:
    """Restore an optimizer's state. Groups that the run had added are added again.

    Args:
        optimizer: The script's.
        saved: Its state in the checkpoint.
        label: Its name in texts: `the optimizer`, `optimizer 'generator'`.
        names: `parameter_names` at the checkpoint; None if unknown.
        made: `options_of` the script's optimizer at that time; None if unknown.
        named: `parameters_by_name` of what it optimizes.
        report: Records what comes from the checkpoint and what from the script.

    Raises:
        ConfigError: It is the state of another optimizer, or of other parameters.
    """
    options = options_of(optimizer)
    own = len(optimizer.param_groups)
    for number, (now, then) in enumerate(zip(options, made or (), strict=False)):
        where = f" of group {number}" if own > 1 else ""
        for key in now.keys() & then.keys():
            if now[key] != then[key]:
                group = saved["param_groups"][number]
                kept = group.get("initial_lr", group[key]) if key == "lr" else group.get(key)
                report.keep(f"{key}{where} of {label} is {_plain(kept)}, the script has {now[key]}")
    if len(saved["param_groups"]) > own:
        _add_groups(optimizer, saved["param_groups"], label=label, names=names, named=named, report=report)
    elif len(saved["param_groups"]) < own:
        for number in range(len(saved["param_groups"]), own):
            text = f"group {number} of {label} is new"
            report.take(text)
            report.lower("approximate", text)
        saved = _with_groups_of(optimizer, saved)
    if names is not None:
        saved = _in_order(saved, names, parameter_names(optimizer, named), label)
    try:
        load_optimizer(optimizer, saved)
    except ValueError as error:
        raise ConfigError(
            f"the checkpoint is of another optimizer than {label} ({error}). Build it over the same parameters, in "
            f"the same groups; or {WEIGHTS_ALONE}"
        ) from error


def _add_groups(
    optimizer: torch.optim.Optimizer,
    groups: Sequence[Mapping[str, Any]],
    *,
    label: str,
    names: Sequence[Sequence[str]] | None,
    named: Mapping[str, torch.nn.Parameter],
    report: ResumeReport,
) -> None:
    """Add the parameter groups that the run had added before its checkpoint."""
    taken = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for number in range(len(optimizer.param_groups), len(groups)):
        wanted = [] if names is None else names[number]
        found = [named[name] for name in wanted if name in named and id(named[name]) not in taken]
        if not found or len(found) < len(wanted):
            raise ConfigError(
                f"{label} has {len(optimizer.param_groups)} parameter groups, in the checkpoint it has "
                f"{len(groups)}: build it with the groups that the run had added; or {WEIGHTS_ALONE}"
            )
        options = {
            key: value for key, value in groups[number].items() if key not in ("params", "param_names")
        }
        optimizer.add_param_group({"params": found, **options})
        report.keep(f"group {number} of {label}, which the run had added ({len(found)} parameters)")


def _with_groups_of(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state that also has the groups which only the script has, as the script made them."""
    groups = list(saved["param_groups"])
    count = sum(len(group["params"]) for group in groups)
    for group in optimizer.param_groups[len(groups) :]:
        size = len(group["params"])
        groups.append({**group, "params": list(range(count, count + size))})
        count += size
    return {**saved, "param_groups": groups}


def _in_order(
    saved: Mapping[str, Any], names: Sequence[Sequence[str]], own: Sequence[Sequence[str]], label: str
) -> Mapping[str, Any]:
    """Return a state whose parameters are in the script's order.

    Raises:
        ConfigError: A group has other parameters.
    """
    # From the checkpoint's index to the script's
    numbers: dict[int, int] = {}
    for number, (theirs, mine) in enumerate(zip(names, own, strict=False)):
        if sorted(theirs) != sorted(mine):
            raise ConfigError(
                f"group {number} of {label} has other parameters than in the checkpoint ({_difference(theirs, mine)}). "
                f"Build it over the same ones; or {WEIGHTS_ALONE}"
            )
        if list(theirs) == list(mine) or len(set(mine)) < len(mine):
            continue
        first = sum(map(len, names[:number]))
        for index, name in enumerate(theirs):
            numbers[first + index] = first + list(mine).index(name)
    if not numbers:
        return saved
    return {**saved, "state": {numbers.get(int(key), key): value for key, value in saved["state"].items()}}


def _difference(theirs: Iterable[str], mine: Iterable[str]) -> str:
    theirs, mine = set(theirs), set(mine)
    parts = {"only in the checkpoint": theirs - mine, "only in the script": mine - theirs}
    return "; ".join(
        f"{what}: {', '.join(sorted(names)[:5])}{' ...' if len(names) > 5 else ''}"
        for what, names in parts.items()
        if names
    )
