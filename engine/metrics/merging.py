"""Merging: the metrics of several processes ("ranks") as one set, as if one process had seen all of their batches.

Counts add up, so results from them are those of one process in every bit. Sums of floats are added in another order,
which may change the last digits. A rank that saw no batch contributes nothing.

A user's metric is merged as its states ask for: each has a reduction (`add_state(..., dist_reduce_fx="sum")`), as
torchmetrics documents them. A mean weighs by the ranks' numbers of batches. What a metric keeps outside of its states
cannot be merged, and is refused rather than lost. torchmetrics itself never synchronises here; see `alone`.

A rank's `state_dict()` has tensors on any device; the merged set has them on its own.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import Tensor

from offloop.engine.errors import ConfigError
from offloop.engine.lazy_imports import first_use
from offloop.engine.metrics.metric_set import MetricSet
from offloop.engine.metrics.names import NAMES
from offloop.engine.metrics.problem import Problem

if TYPE_CHECKING:
    from torchmetrics import Metric

_HOW: Final = (
    'give it a reduction, add_state(name, default, dist_reduce_fx="sum") or another one of torchmetrics\' '
    "(mean, max, min, cat, or a function of the ranks' stacked values)"
)


def check_mergeable(metrics: MetricSet) -> None:
    """Check before a run of several processes that a set's metrics can be merged. Touches no device.

    Raises:
        ConfigError: A user's metric cannot be merged.
    """
    for name, metric in metrics.of_the_user().items():
        _check_states(name, metric)


def merged(metrics: MetricSet, states: Sequence[Mapping[str, Any]]) -> MetricSet:
    """Return a set with the batches of all ranks. `metrics` does not change.

    Thread: training thread only. Does not block, but for a copy of what the states hold to the device.

    Args:
        metrics: This rank's set.
        states: The `state_dict()` of each rank's set, by rank.

    Raises:
        ConfigError: A user's metric cannot be merged.
        ValueError: The ranks have other metrics, or batches of different tasks.
    """
    kinds = [state["metrics"] for state in states]
    if kinds.count(kinds[0]) < len(kinds):
        raise ValueError(f"the metrics differ between ranks: {_by_rank(map(', '.join, kinds))}")
    whole = metrics.anew()
    fed = {rank: state for rank, state in enumerate(states) if state["batches"]}
    if not fed:
        return whole
    problem = _common_problem(metrics, {rank: Problem(*state["problem"]) for rank, state in fed.items()})
    unfed = [set(state.get("unfed", ())) for state in fed.values()]
    own: dict[str, dict[str, Any]] = {}
    for name, metric in metrics.of_the_user().items():
        # A rank that resumed with a new metric has not fed it before its next batch
        having = [state for state, without in zip(fed.values(), unfed, strict=True) if name not in without]
        weights = [state["batches"] for state in having]
        own[name] = _merged_states(name, metric, [state["own"][name] for state in having], weights)
    for name, live, given in metrics.of_the_user_in_use():
        _check_attributes(name, live, given)
    names, sums = _merged_sums(list(fed.values()))
    whole.load_state_dict(
        {
            "metrics": kinds[0],
            "batches": sum(state["batches"] for state in fed.values()),
            "problem": tuple(problem),
            "names": names,
            "sums": sums,
            "own": own,
            "unfed": sorted(set.intersection(*unfed)),
        }
    )
    return whole


def _by_rank(texts: Iterable[object]) -> str:
    return "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts))


def _common_problem(metrics: MetricSet, problems: Mapping[int, Problem]) -> Problem:
    """Return the problem of all ranks: the one with most classes."""
    first = next(iter(problems.values()))
    largest = max(problem.size for problem in problems.values())
    named = metrics.named()
    may_grow = not any(NAMES[name].view == "scores" for name in named)
    for problem in problems.values():
        is_larger = problem.task == "multiclass" and problem._replace(size=first.size) == first
        if problem != first and not (is_larger and may_grow):
            kinds = "; ".join(f"rank {rank}: {each.in_words()}" for rank, each in problems.items())
            dims = {each.class_dim for each in problems.values()}
            hint = "" if len(dims) == 1 else ", with the classes in another dimension"
            raise ValueError(
                f"metrics {', '.join(map(repr, named))}: the first batches of the ranks are of different "
                f"tasks ({kinds}{hint}); return outputs and targets of one task from each step"
            )
    return first._replace(size=largest)


def _merged_sums(states: Sequence[Mapping[str, Any]]) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """Return which names share sums, and the sums.

    Names that share them on one rank may not do so on another one, which was resumed with new names before its first
    batch. Here those share sums that do so on all ranks.
    """
    places: list[dict[str, int]] = [
        {name: place for place, names in enumerate(state["names"]) for name in names} for state in states
    ]
    groups: dict[tuple[int, ...], list[str]] = {}
    for name in places[0]:
        groups.setdefault(tuple(of_rank[name] for of_rank in places), []).append(name)
    sums: list[dict[str, Any]] = []
    for of_group in groups:
        of_ranks = [state["sums"][place] for state, place in zip(states, of_group, strict=True)]
        sums.append({key: _total([each[key] for each in of_ranks]) for key in of_ranks[0]})
    return list(groups.values()), sums


def _total(values: Sequence[Any]) -> Any:
    """Return the sum of numbers or tensors, lists one after the other."""
    if isinstance(values[0], list):
        return [item for value in values for item in value]
    total = values[0]
    for value in values[1:]:
        # Only a rank's larger batches had these classes
        if isinstance(value, Tensor) and value.shape != total.shape and value.ndim == total.ndim == 1:
            size = max(len(value), len(total))
            total, value = (torch.nn.functional.pad(each, (0, size - len(each))) for each in (total, value))
        total = total + value
    return total


# A user's metric ---------------------------------------------------------------------------------------------


def _members(metric: "Metric") -> "Iterable[tuple[str, Metric]]":
    """Yield a metric and those that it wraps, with the prefixes of their states."""
    from torchmetrics import Metric

    for path, module in metric.named_modules():
        if isinstance(module, Metric):
            yield f"{path}." if path else "", module


def _check_states(name: str, metric: "Metric") -> None:
    """Check that each state says how it is merged.

    Raises:
        ConfigError: One does not, or the metric is known to depend on one process's batches.
    """
    with first_use("torchmetrics"):
        from torchmetrics.wrappers import MinMaxMetric, Running

    what = f"metric {name!r}, a {type(metric).__name__}, cannot be merged from several processes"
    for _, member in _members(metric):
        if isinstance(member, Running):
            raise ConfigError(f"{what}: its window is of one process's batches; use the metric in it")
        if isinstance(member, MinMaxMetric):
            raise ConfigError(f"{what}: it keeps earlier passes in one process; use the metric in it")
        if _is_of_torchmetrics(member):
            continue
        for state, reduction in member._reductions.items():
            if reduction is None and isinstance(member._defaults[state], Tensor):
                raise ConfigError(f"{what}: its state {state!r} has none of the reductions; {_HOW}")


def _is_of_torchmetrics(metric: "Metric") -> bool:
    """Return True for classes whose code is torchmetrics' own: those merge what they keep."""
    methods = (type(metric).update, type(metric).compute)
    return all(method.__module__.startswith("torchmetrics.") for method in methods)


def _merged_states(
    name: str, metric: "Metric", states: Sequence[Mapping[str, Any]], weights: Sequence[int]
) -> dict[str, Any]:
    """Return the states of a user's metric, merged by its reductions.

    Raises:
        ConfigError: One cannot be merged.
    """
    _check_states(name, metric)
    if len(states) < 2:
        return dict(states[0]) if states else metric.state_dict()
    reductions = {
        f"{prefix}{state}": reduction
        for prefix, member in _members(metric)
        for state, reduction in member._reductions.items()
    }
    result: dict[str, Any] = {}
    for key in states[0]:
        values = [state[key] for state in states]
        try:
            if key in reductions:
                # A string becomes a function in `add_state`
                result[key] = _reduced(values, cast("Callable[[Any], Any] | None", reductions[key]), weights)
            else:
                result[key] = _equal(values)
        except Exception as error:
            raise ConfigError(
                f"metric {name!r}, a {type(metric).__name__}: its state {key!r} cannot be merged from several "
                f"processes ({type(error).__name__}: {error}); {_HOW}"
            ) from error
    return result


def _reduced(values: Sequence[Any], reduction: Callable[[Any], Any] | None, weights: Sequence[int]) -> Any:
    """Return the ranks' values of one state, reduced as torchmetrics documents it."""
    from torchmetrics.utilities.data import dim_zero_cat, dim_zero_mean

    if isinstance(values[0], list):
        items = [item for value in values for item in value]
        if reduction is None or reduction is dim_zero_cat or not items:
            return items
        # As torchmetrics does: a function of all items
        return reduction(items)
    if reduction is dim_zero_cat:
        return torch.cat([torch.atleast_1d(value) for value in values])
    stacked = torch.stack(list(values))
    if reduction is dim_zero_mean:
        if bool((stacked == stacked[0]).all()):
            return values[0]
        shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
        return torch.tensordot(shares, stacked.double(), 1).to(_floating(stacked.dtype))
    return stacked if reduction is None else reduction(stacked)


def _floating(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.is_floating_point else torch.get_default_dtype()


def _equal(values: Sequence[Any]) -> Any:
    """Return what a metric keeps beside its states, like the weights of a network, if it is the same on all ranks."""
    if any(_differs(value, values[0]) for value in values[1:]):
        raise ValueError("it is no state of the metric, and differs between ranks")
    return values[0]


def _check_attributes(name: str, live: "Metric", given: "Metric") -> None:
    """Check that a metric has not counted in attributes that are no states.

    Args:
        name: Its key.
        live: The one that was given batches.
        given: The user's own.

    Raises:
        ConfigError: It has.
    """
    from torchmetrics import SumMetric

    # What torchmetrics keeps in every metric
    base = vars(SumMetric())
    for (_, member), (_, before) in zip(_members(live), _members(given), strict=False):
        if _is_of_torchmetrics(member):
            continue
        for attribute, value in vars(member).items():
            if attribute in base or attribute in member._defaults:
                continue
            if _differs(value, vars(before).get(attribute)):
                raise ConfigError(
                    f"metric {name!r}, a {type(live).__name__}, cannot be merged from several processes: its update "
                    f"changes self.{attribute}, which is no state; {_HOW}, or set it in __init__"
                )


def _differs(one: Any, other: Any) -> bool:
    """Return True if plain values or tensors differ; other objects do not."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        one, other = one.detach().cpu(), other.detach().cpu()
        return one.shape != other.shape or not bool(torch.allclose(one, other, 0, 0, equal_nan=True))
    if type(one) is not type(other):
        return True
    if isinstance(one, Mapping):
        return one.keys() != other.keys() or any(_differs(each, other[key]) for key, each in one.items())
    if isinstance(one, list | tuple):
        return len(one) != len(other) or any(map(_differs, one, other))
    if isinstance(one, bool | int | float | str | set | frozenset):
        return bool(one != other) and not (one != one and other != other)
    return False
