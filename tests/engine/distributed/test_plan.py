"""Before a run: rank 0 decides, the others learn, and a difference between ranks is one error everywhere."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]  # it is there

from offloop.engine import Callback, TrainerConfig
from offloop.engine.callback import lookup
from offloop.engine.distributed.plan import Decision, Fingerprint, Plan, fingerprint
from offloop.engine.errors import ConfigError
from offloop.engine.session.ranks import check_alike
from offloop.engine.training.setup import Limits


class Watches(Callback):
    pass


def of(
    model: torch.nn.Module | None = None, *callbacks: Callback, length: int = 8, epochs: int = 3, **knobs: Any
) -> Fingerprint:
    model = model or torch.nn.Linear(4, 2)
    optimizers = {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    config = TrainerConfig(**knobs)
    return fingerprint(
        model,
        optimizers,
        config,
        lookup(callbacks),
        Limits(epochs=epochs),
        {"length of train_loader": length},
    )


def decision(own: Fingerprint) -> Decision:
    return Decision(
        run_id="run-1", directory="/runs/run-1", which="last", fingerprint=own, deciders=["on_epoch_end"]
    )


def start(own: list[Fingerprint]) -> list[Decision | BaseException]:
    """Let all ranks plan a run; return what each learned, or raised."""
    store = HashStore()

    def of_rank(rank: int) -> Decision | BaseException:
        plan = Plan(store, rank, len(own))
        try:
            if rank == 0:
                made = decision(own[0])
                plan.announce(made)
            else:
                made = plan.learn()
                try:
                    plan.check(own[rank])
                except ConfigError as error:
                    plan.refuse(error)
                    raise
            plan.ready()
        except ConfigError as error:
            return error
        return made

    with ThreadPoolExecutor(len(own)) as pool:
        return list(pool.map(of_rank, range(len(own))))


def test_all_ranks_have_the_decision_of_rank_0() -> None:
    same = of()
    first, *others = start([same] * 3)
    assert others == [first, first]


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (lambda: of(torch.nn.Linear(4, 3)), "they differ in model"),
        (lambda: of(None, Watches()), "they differ in callbacks"),
        (
            lambda: of(length=9),
            "they differ in length of train_loader: rank 1 has 9 batches, rank 0 has 8 batches",
        ),
        (
            lambda: of(precision="bf16-mixed"),
            "they differ in knobs: rank 1 has precision='bf16-mixed', rank 0 has",
        ),
        (lambda: of(epochs=4), "they differ in limits: rank 1 has epochs=4, rank 0 has epochs=3"),
        (lambda: of(run_name="other"), "they differ in run_name: rank 1 has other, rank 0 has None"),
    ],
)
def test_ranks_that_were_started_differently_all_get_an_error(
    other: Callable[[], Fingerprint], text: str
) -> None:
    for outcome in start([of(), other(), of()]):
        assert isinstance(outcome, ConfigError)
        assert text in str(outcome)


def test_the_values_of_weights_and_the_device_may_differ() -> None:
    assert of(torch.nn.Linear(4, 2)) == of(torch.nn.Linear(4, 2), device="cpu")


def test_a_refusal_of_rank_0_is_that_of_all() -> None:
    store = HashStore()
    Plan(store, 0, 2).refuse(ValueError("run_name exists already"))
    with pytest.raises(ConfigError, match="rank 0 has started no run: ValueError: run_name exists already"):
        Plan(store, 1, 2).learn()


def test_a_refusal_of_rank_0_after_its_decision_is_that_of_all() -> None:
    store = HashStore()
    first, second = Plan(store, 0, 2), Plan(store, 1, 2)
    first.announce(decision(of()))
    second.learn()
    first.refuse(RuntimeError("no thread can be started"))
    with pytest.raises(ConfigError, match="rank 0 has started no run: RuntimeError: no thread"):
        second.ready()


def test_a_model_that_is_wrapped_already_is_refused() -> None:
    """Gradients would be averaged twice, and names in checkpoints begin with `module.`."""
    wrapped = torch.nn.parallel.DistributedDataParallel
    program = SimpleNamespace(model=wrapped.__new__(wrapped))
    plan: Any = SimpleNamespace(setup=None, program=program)
    with pytest.raises(ConfigError, match=r"give it the module inside, model\.module"):
        check_alike(cast(Any, None), plan, [], None)
