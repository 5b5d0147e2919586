"""Scenarios: which samples each rank trains and validates on, and the numbers of all of them together."""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from rank_scripts.parts import (
    CLASSES,
    FEATURES,
    Classifier,
    adam,
    classifier,
    crc,
    loader,
    net,
    samples,
    train,
    weights,
)
from rank_scripts.talk import RANK, WORLD_SIZE
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Subset

from offloop.engine import Callback, ConfigError, RankFailedError, in_step


def strategy_none() -> Any:
    """Nothing distributed is asked for: each process trains alone, and nothing of engine/distributed is loaded."""
    import torch.distributed as dist

    torch.manual_seed(3)
    trainer = classifier(net(seed=1), strategy="none")
    found = train(trainer, loader(samples(101), shuffle=True), loader(samples(37, seed=1)), epochs=2)
    return {
        **found,
        "loaded": [name for name in sys.modules if name.startswith("offloop.engine.distributed")],
        "has_group": dist.is_initialized(),
    }


def split() -> Any:
    """The script of one process, on any number of ranks. The order of samples is drawn from rank 0's random state."""
    model = net()
    torch.manual_seed(5 + RANK)
    trainer = classifier(model)
    found = train(
        trainer,
        loader(samples(101), shuffle=True),
        loader(samples(53, seed=1)),
        epochs=3,
        metrics=["accuracy", "f1_score", "roc_auc"],
    )
    return {**found, "random_state": crc([torch.get_rng_state()])}


def workers() -> Any:
    """The same with workers that load ahead."""
    model = net()
    torch.manual_seed(5 + RANK)
    return train(
        classifier(model),
        loader(samples(53), shuffle=True, num_workers=1),
        loader(samples(21, seed=1), num_workers=1),
        epochs=2,
        metrics=["accuracy"],
    )


def whole() -> Any:
    """Whole batches in turn: 13 of 8, so the last step has one batch."""
    return train(classifier(rank_batches="whole"), loader(samples(101)), epochs=2, metrics=["accuracy"])


def whole_in_one() -> Any:
    """What `whole` has to equal: batches of 16 in one process."""
    return train(classifier(), loader(samples(101), 16), epochs=2, metrics=["accuracy"])


def own() -> Any:
    """Each rank's loader has samples of its own: together the batches of one process."""
    part = Subset(samples(104), range(RANK, 104, WORLD_SIZE))
    return train(
        classifier(rank_batches="own"), loader(part, 8 // WORLD_SIZE), epochs=2, metrics=["accuracy"]
    )


class Stream(IterableDataset[Any]):
    """Samples without indices and without a length; each rank has others."""

    def __init__(self, count: int) -> None:
        self.data = samples(count)

    def __iter__(self) -> Iterator[Any]:
        for number in range(RANK, len(self.data), WORLD_SIZE):
            yield self.data[number]


def own_stream() -> Any:
    """A loader without a length. With two ranks, the last batch of rank 1 has one sample less: 26 and 25."""
    return train(
        classifier(rank_batches="own"),
        DataLoader(Stream(51), batch_size=4 * 2 // WORLD_SIZE),
        epochs=2,
        metrics=["accuracy"],
    )


def distributed_sampler() -> Any:
    """A DistributedSampler is left in place and told its epoch."""
    data = samples(48)
    share: dict[str, Any] = {"num_replicas": WORLD_SIZE, "rank": RANK, "shuffle": True, "seed": 1}
    sampler: DistributedSampler[Any] = DistributedSampler(data, **share)
    found = train(classifier(rank_batches="own"), DataLoader(data, 4, sampler=sampler), epochs=2)
    expected = []
    by_hand: DistributedSampler[Any] = DistributedSampler(data, **share)
    for epoch in range(2):
        by_hand.set_epoch(epoch)
        expected += list(by_hand)
    return {**found, "expected": expected}


def uneven_validation() -> Any:
    """One rank has no batch of a validation; another has one more than the other."""
    trainer = classifier()
    return train(
        trainer,
        loader(samples(32)),
        {"short": loader(samples(5, seed=1)), "long": loader(samples(43, seed=2))},
        epochs=2,
        metrics=["accuracy", "roc_auc"],
    )


class Predicting(Classifier):
    def predict_step(self, batch: Any) -> Any:
        return self.model(batch[0])


def evaluate_and_predict() -> Any:
    """All ranks evaluate together; rank 0 gets all predictions in order."""
    model = net(seed=4)
    trainer, data = Predicting(model, adam(model), device="cpu"), loader(samples(43, seed=2))
    metrics = trainer.evaluate(data, metrics=["accuracy", "f1_score"])
    outputs = trainer.predict(data)
    return {"metrics": dict(metrics), "lengths": [len(each) for each in outputs], "outputs": crc(outputs)}


class Hooks(Callback):
    """Remembers where its methods ran."""

    def __init__(self) -> None:
        self.observed = 0

    async def on_epoch_end(self, event: Any, run: Any) -> None:
        self.observed += 1


class EverywhereHooks(Hooks):
    """The same on all ranks."""

    ranks = "all"


def callbacks() -> Any:
    """Observers run on rank 0, or on all ranks where the callback asks for it."""
    first, everywhere = Hooks(), EverywhereHooks()
    trainer = classifier()
    found = train(trainer, loader(samples(32)), epochs=2, callbacks=[first, everywhere])
    return {
        **found,
        "observed": [first.observed, everywhere.observed],
        "rank": [getattr(trainer, name) for name in ("rank", "world_size")],
    }


def seeds() -> Any:
    """`seed=` gives each rank a stream of its own, rank 0 that of one process; without it nothing is drawn."""
    drawn: list[float] = []

    class Drawing(Callback):
        @in_step
        def before_forward(self, point: Any) -> None:
            drawn.append(torch.rand(()).item())

    found = train(classifier(seed=9), loader(samples(32), shuffle=True), epochs=2, callbacks=[Drawing()])
    return {**found, "drawn": drawn}


# Bad input: one error on each rank, and the group lives on -------------------------------------------


def _refused(make: Any) -> list[str]:
    try:
        make()
    except (ConfigError, RankFailedError) as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


def refusals() -> Any:
    """Each of these is one error on every rank, before the first step."""

    def other_model() -> None:
        model = torch.nn.Sequential(torch.nn.Linear(FEATURES, 4 + RANK), torch.nn.Linear(4 + RANK, CLASSES))
        classifier(model).train(loader(samples(32)), epochs=1)

    def other_optimizer() -> None:
        model = net()
        made = torch.optim.SGD if RANK else torch.optim.Adam
        classifier(model, made(model.parameters(), lr=0.1)).train(loader(samples(32)), epochs=1)

    def other_callbacks() -> None:
        classifier().train(loader(samples(32)), epochs=1, callbacks=[Hooks()] * RANK)

    def other_window() -> None:
        classifier(accumulate_grad_batches=1 + RANK).train(loader(samples(32)), epochs=1)

    def other_name() -> None:
        classifier(run_name=f"rank-{RANK}").train(loader(samples(32)), epochs=1)

    def few_samples() -> None:
        classifier().train(loader(samples(1)), epochs=1)

    def no_indices() -> None:
        classifier().train(DataLoader(Stream(32), batch_size=4), epochs=1)

    def sync_batchnorm() -> None:
        classifier(net(batch_norm=True), sync_batchnorm=True).train(loader(samples(32)), epochs=1)

    def finder() -> None:
        classifier().find_learning_rate(loader(samples(32)), steps=10)

    made = (
        other_model,
        other_optimizer,
        other_callbacks,
        other_window,
        other_name,
        few_samples,
        no_indices,
        sync_batchnorm,
        finder,
    )
    refused = {each.__name__: _refused(each) for each in made}
    # And the ranks still train together
    trainer = classifier()
    trainer.train(loader(samples(32)), epochs=1)
    return {"refused": refused, "weights": weights(trainer.model)}
