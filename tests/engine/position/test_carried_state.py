"""What a run carries beside its checkpoints is named, and what is no state is not."""

import collections
import random
import weakref
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch

from offloop.engine.position.carried_state import (
    CarriedState,
    Owner,
    owner_of_optimizer,
    owners_in_module,
)


class Holder:
    """Something with attributes."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


def names(carried: CarriedState, **state: Any) -> list[str]:
    return [each.partition(" is not saved")[0] for each in carried.unsaved(state)]


def watch(holder: Any, *known: Any, **settings: Any) -> CarriedState:
    return CarriedState([Owner("Holder", holder, hint="save it", **settings)], known)


def changed_by(change: Any, **attributes: Any) -> list[str]:
    """Names of what has changed in a holder of these attributes."""
    holder: Any = Holder(**attributes)
    carried = watch(holder)
    assert names(carried) == []
    change(holder)
    return names(carried)


def teacher_step(holder: Any) -> None:
    for parameter in holder.teacher.parameters():
        parameter.data.mul_(0.9)  # torch counts no change of it


def step(holder: Any) -> None:
    holder.optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
    holder.optimizer.step()


@pytest.mark.parametrize(
    ("attribute", "value", "change"),
    [
        ("hidden", torch.zeros(2), lambda each: setattr(each, "hidden", each.hidden + 1)),
        ("hidden", torch.zeros(2), lambda each: each.hidden.add_(1)),
        ("states", [torch.zeros(2)], lambda each: each.states.append(torch.ones(2))),
        ("queue", collections.deque([torch.zeros(2)]), lambda each: each.queue[0].add_(1)),
        ("inner", Holder(hidden=torch.zeros(2)), lambda each: each.inner.hidden.zero_()),
        ("by_name", {"a": {"b": torch.zeros(2)}}, lambda each: each.by_name["a"]["b"].zero_()),
        ("generator", torch.Generator(), lambda each: torch.rand(1, generator=each.generator)),
        ("rng", random.Random(0), lambda each: each.rng.random()),
        ("rng", numpy.random.default_rng(0), lambda each: each.rng.random()),
        ("rng", numpy.random.RandomState(0), lambda each: each.rng.random_sample()),
        ("table", numpy.zeros(3), lambda each: each.table.__setitem__(0, 1.0)),
        ("teacher", torch.nn.Linear(2, 2), teacher_step),
        ("optimizer", torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9), step),
        ("count", 0, lambda each: setattr(each, "count", 1)),
        ("best", float("nan"), lambda each: setattr(each, "best", 0.5)),
        ("losses", [0.5], lambda each: each.losses.append(0.4)),
        ("inner", Holder(level=1), lambda each: setattr(each.inner, "level", 2)),
    ],
)
def test_what_has_changed_is_named(attribute: str, value: Any, change: Any) -> None:
    assert changed_by(change, **{attribute: value}) == [f"Holder.{attribute}"]


def test_what_came_during_the_run_is_named_if_it_holds_state() -> None:
    def change(holder: Any) -> None:
        holder.hidden = torch.zeros(2)
        holder.batches = iter([1, 2])  # where it stands cannot be read
        holder.path, holder.function = object(), len

    assert changed_by(change) == ["Holder.hidden", "Holder.batches"]


def test_schedule_that_is_stepped_by_hand_is_named() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5)

    def change(holder: Any) -> None:
        optimizer.step()
        holder.schedule.step()

    assert changed_by(change, schedule=schedule) == ["Holder.schedule"]


def test_generator_on_the_class_is_seen() -> None:
    class WithGenerator(Holder):
        rng = random.Random(0)

    holder: Any = WithGenerator()
    carried = watch(holder)
    holder.rng.random()
    assert names(carried) == ["Holder.rng"]


def test_what_does_not_change_and_what_the_run_saves_is_not_named() -> None:
    head = torch.nn.Linear(2, 2)
    model = torch.nn.Sequential(head, torch.nn.BatchNorm1d(2))
    holder: Any = Holder(
        weights=torch.ones(3),
        rng=random.Random(0),
        text="a",
        dataset=torch.utils.data.TensorDataset(torch.ones(2)),
        model=model,
        head=head,
        rows=head.weight.data,
        default=torch.default_generator,
        function=lambda: None,
    )
    holder.itself = holder
    carried = watch(holder, model)
    with torch.no_grad():
        head.weight.add_(1)
    torch.rand(1)
    holder.weights.sum()
    assert names(carried) == []


def test_what_a_state_dict_returns_is_not_named() -> None:
    holder: Any = Holder(
        _hidden=torch.zeros(2), memory=torch.zeros(2), other=torch.zeros(2), gone=torch.zeros(2), n=0
    )
    holder.generator, holder.rng = torch.Generator(), random.Random(0)
    carried = watch(holder, saved=("trainer",), counts_plain=False)
    for each in (holder._hidden, holder.memory, holder.other, holder.gone):
        each.add_(1)
    holder.n = 5
    torch.rand(1, generator=holder.generator)
    holder.rng.random()
    state = {
        "hidden": holder._hidden.clone(),
        "where": [{"m": holder.memory}],  # the same memory under another name
        "copy": holder.other.clone(),  # the same numbers
        "random": holder.generator.get_state(),
        "rng_state": list(holder.rng.getstate()[1]),
    }
    holder.gone.add_(1)
    assert names(carried, trainer=state) == ["Holder.gone"]


def test_a_key_of_none_says_that_it_is_no_state() -> None:
    holder: Any = Holder(losses=[])
    model = torch.nn.Sequential(Remembers())
    owners = [
        Owner("Holder", holder, hint="", saved=("trainer",)),
        *owners_in_module("model", model, "model"),
    ]
    carried = CarriedState(owners, [model])
    holder.losses.append(1.0)
    model(torch.ones(1))
    assert names(carried, trainer={"losses": None, "model.0.last": None, "model.0.calls": None}) == []


class Remembers(torch.nn.Module):
    """Keeps its last input, as a recurrent module or one that is looked at does."""

    def __init__(self) -> None:
        super().__init__()
        self.last: torch.Tensor | None = None
        self.calls = 0
        self.register_buffer("sums", torch.zeros(1))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.last = inputs.detach()
        self.calls += 1
        self.get_buffer("sums").add_(inputs.sum())
        return inputs


def test_attributes_of_modules_are_named_by_their_place() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Sequential(Remembers()))
    carried = CarriedState(owners_in_module("model", model, "model"), [model])
    model(torch.ones(1))
    model.eval().train()
    assert names(carried) == ["model.1.0.last", "model.1.0.calls"]
    (first, _) = carried.unsaved({})
    assert "register_buffer" in first


def test_generator_in_the_extra_state_of_a_module_is_saved() -> None:
    class Noisy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.source = torch.Generator().manual_seed(0)

        def get_extra_state(self) -> Any:
            return {"state": self.source.get_state()}

        def set_extra_state(self, state: Any) -> None:
            self.source.set_state(state["state"])

    noisy = Noisy()
    model = torch.nn.Sequential(noisy)
    carried = CarriedState(owners_in_module("model", model, "model"), [model])
    torch.rand(1, generator=noisy.source)
    assert names(carried, model=model.state_dict()) == []
    assert names(carried) == ["model.0.source"]


def test_module_with_an_extra_state_says_itself_which_numbers_are_state() -> None:
    class Own(Remembers):
        def get_extra_state(self) -> Any:
            return {"last": self.last}

        def set_extra_state(self, state: Any) -> None:
            self.last = state["last"]

    model = Own()
    carried = CarriedState(owners_in_module("model", model, "model"), [model])
    model(torch.ones(1))
    assert names(carried, model=model.state_dict()) == []
    assert names(carried, model={}) == ["model.last"]


class Lookahead(torch.optim.Optimizer):
    """Wraps an optimizer and keeps slow weights, which its `state_dict` leaves out."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner
        self.slow = [each.detach().clone() for group in inner.param_groups for each in group["params"]]
        self.count = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()
        self.count += 1
        for slow, fast in zip(self.slow, self.inner.param_groups[0]["params"], strict=True):
            slow.lerp_(fast.detach(), 0.5)


class Whole(Lookahead):
    """Likewise, but its `state_dict` is complete."""

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "inner": self.inner.state_dict(),
            "slow": self.slow,
            "count": self.count,
        }


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(Lookahead, ["Lookahead.inner", "Lookahead.slow", "Lookahead.count"]), (Whole, [])],
)
def test_state_of_a_wrapped_optimizer_is_named_unless_it_is_saved(kind: Any, expected: list[str]) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = kind(torch.optim.SGD([parameter], lr=0.1, momentum=0.9))
    model = torch.nn.Module()
    model.weight = parameter
    carried = CarriedState([owner_of_optimizer("optimizer", optimizer)], [model, optimizer])
    for _ in range(2):
        parameter.grad = torch.ones(2)
        optimizer.step()
    state = {"model": model.state_dict(), "optimizers": {"optimizer": optimizer.state_dict()}}
    assert names(carried, **state) == expected


def test_optimizers_of_torch_hold_nothing_beside_their_state() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    model = torch.nn.Module()
    model.weight = parameter
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5)  # puts its mark on the optimizer
    carried = CarriedState([owner_of_optimizer("optimizer", optimizer)], [model, optimizer, schedule])
    parameter.grad = torch.ones(2)
    optimizer.step()
    schedule.step()
    assert names(carried, optimizers={"optimizer": optimizer.state_dict()}) == []


def test_looking_keeps_nothing_alive_and_fails_for_nothing() -> None:
    class Hostile:
        def __getattribute__(self, name: str) -> Any:
            raise RuntimeError("do not look")

    def endless() -> Iterator[int]:
        while True:
            yield 1

    deep: Any = None
    for _ in range(99):
        deep = [deep]
    holder: Any = Holder(hostile=Hostile(), endless=endless(), deep=deep)
    holder.sparse, holder.meta = torch.eye(2).to_sparse(), torch.empty(2, device="meta")
    holder.hidden = hidden = torch.zeros(2)
    carried = watch(holder)
    gone = weakref.ref(hidden)
    holder.hidden = None
    del hidden
    assert gone() is None
    assert names(carried) == ["Holder.endless", "Holder.hidden"]
