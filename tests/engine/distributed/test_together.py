"""Evaluations and predictions of real processes together, against one process."""

from collections.abc import Callable

import pytest
from rank_processes import Ranks

SETUP = """
import asyncio
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchmetrics.classification import MulticlassAUROC
from offloop.engine import Trainer, ConfigError
from offloop.engine.testing import tiny_batches, tiny_trainer

inputs, classes = (torch.cat(parts) for parts in zip(*tiny_batches(5), strict=True))
data = TensorDataset(inputs, classes)
loader = DataLoader(data, batch_size=3)  # 7 batches, the last of 2
METRICS = ["accuracy", "f1", "roc_auc", MulticlassAUROC(3)]

def trainer_of(strategy, **knobs):
    torch.manual_seed(0)
    width = inputs.shape[1]
    model = nn.Sequential(nn.Linear(width, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    if strategy == "auto" and rank:
        with torch.no_grad():
            for each in (*model.parameters(), model[1].running_mean):
                each += 1.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Trainer(model, optimizer, loss=nn.functional.cross_entropy, strategy=strategy, **knobs)

def close(one, other):
    assert list(one) == list(other), (one, other)
    for key in one:
        exact = key.removeprefix("val_") in ("accuracy", "f1_score")
        assert one[key] == other[key] if exact else abs(one[key] - other[key]) < 1e-6, (key, one, other)
"""


def run(ranks: Callable[[str], Ranks], script: str, world_size: int = 2) -> list[str]:
    """Run a script on all ranks, which must succeed; return what each has said."""
    found = ranks(SETUP + script.replace("\n    ", "\n")).run(world_size)
    for code, said in found:
        assert code == 0, said
    return [said for _, said in found]


def test_an_evaluation_of_all_ranks_is_that_of_one_process(ranks: Callable[[str], Ranks]) -> None:
    """Whatever the shares, with the weights and buffers of rank 0, in any thread, as often as asked for."""
    script = """
    together, alone = trainer_of("auto"), trainer_of("none")
    first = together.evaluate(loader, metrics=METRICS)
    close(first, alone.evaluate(loader, metrics=METRICS))
    batches = list(loader)
    for made in (
        lambda: batches,
        lambda: batches[:1],
        lambda: {"one": loader, "two": batches[:1]},
        lambda: iter(batches),
    ):
        close(*(each.evaluate(made(), metrics=["f1"]) for each in (together, alone)))
    close(asyncio.run(together.evaluate_async(loader, metrics=METRICS)), first)
    for limit in (1, 2, 5, 0.5):
        limited = [trainer_of(each, limit_val_batches=limit) for each in ("auto", "none")]
        close(*(each.evaluate(loader, metrics=["f1"]) for each in limited))
    say(sorted(first.items()))
    """
    assert len(set(run(ranks, script, world_size=3))) == 1


def test_a_prediction_gives_rank_0_everything_in_order(ranks: Callable[[str], Ranks]) -> None:
    script = """
    together, alone = trainer_of("auto"), trainer_of("none")
    for each in (loader, list(loader), list(loader)[:1]):
        outputs = together.predict(each)
        expected = alone.predict(each)
        assert len(outputs) == (0 if rank else len(expected)), len(outputs)
        assert all(torch.equal(*pair) for pair in zip(outputs, expected))

    class Named(Trainer):
        def predict_step(self, batch):
            return {"outputs": self.model(batch[0]), "name": f"of {len(batch[0])}"}

    named = Named(together.model, torch.optim.SGD(together.model.parameters(), lr=0.1))
    names = [each["name"] for each in named.predict(loader)]
    assert names == ([] if rank else ["of 3"] * 6 + ["of 2"])

    async def main():
        async with together.predict_async(loader) as stream:
            say(len([each async for each in stream]))
        async with together.predict_async(loader, read_ahead=1) as stream:
            # Rank 0 leaves early: the others end, too
            async for each in stream:
                break
        async with together.predict_async(loader) as stream:
            # The others leave at once: rank 0 gets their batches all the same
            if rank == 0:
                say(sum([len(each) async for each in stream]))
    asyncio.run(main())
    close(together.evaluate(loader), alone.evaluate(loader))
    """
    assert run(ranks, script) == ["7\n20\n", "0\n"]


def test_a_sampler_of_ranks_counts_no_sample_twice(ranks: Callable[[str], Ranks]) -> None:
    script = """
    data = TensorDataset(inputs[:19], classes[:19])
    sampler = DistributedSampler(data, num_replicas=2, rank=rank, shuffle=False)
    own = DataLoader(data, batch_size=3, sampler=sampler)
    together, alone = trainer_of("auto"), trainer_of("none")
    whole = DataLoader(data, batch_size=3)
    close(together.evaluate(own, metrics=["f1"]), alone.evaluate(whole, metrics=["f1"]))
    outputs, expected = together.predict(own), torch.cat(alone.predict(whole))
    if rank == 0:
        found = torch.cat(outputs)
        assert len(found) == 19
        assert torch.equal(found.sort(0).values, expected.sort(0).values)
    """
    run(ranks, script)


def test_ranks_that_do_different_things_say_so_and_can_go_on(ranks: Callable[[str], Ranks]) -> None:
    script = """
    trainer = trainer_of("auto")

    def refused(call):
        try:
            call()
        except (ConfigError, TypeError) as error:
            say(str(error))
        else:
            say("not refused")

    refused(lambda: trainer.evaluate(loader, metrics=["accuracy" if rank else "f1"]))
    refused(lambda: trainer.predict(loader) if rank else trainer.evaluate(loader))
    refused(lambda: trainer.evaluate(loader if rank else None))
    refused(lambda: trainer.evaluate(list(loader)[rank:]))
    refused(lambda: trainer.find_batch_size(loader))
    refused(lambda: trainer.find_learning_rate(loader))
    trainer.evaluate(loader)
    """
    for rank, said in enumerate(run(ranks, script)):
        metrics, call, argument, length, size, rate = said.splitlines()
        assert "all ranks must be started alike, but they differ in metrics" in metrics
        assert "they differ in the call: rank 1 has predict, rank 0 has evaluate" in call
        assert "loader must be iterable over batches, got NoneType" in argument
        assert "they differ in length of loader val_: rank 1 has 6, rank 0 has 7" in length
        assert size.startswith("find_batch_size wants one process, and 2 were started together"), rank
        assert rate.startswith("find_learning_rate wants one process"), rank


@pytest.mark.parametrize("what", ["evaluate", "predict"])
def test_a_rank_that_fails_is_named_on_the_others(ranks: Callable[[str], Ranks], what: str) -> None:
    script = f"""
    from offloop.engine import RankFailedError

    class Failing(Trainer):
        def step(self, batch):
            if rank == 1:
                raise KeyError("no such word")
            return self.model(batch[0]).sum()

        validation_step = predict_step = step

    whole = trainer_of("auto")
    failing = Failing(whole.model, torch.optim.SGD(whole.model.parameters(), lr=0.1), rank_timeout=10.0)
    try:
        failing.{what}(loader)
    except (KeyError, RankFailedError) as error:
        say(type(error).__name__, "no such word" in str(error), getattr(error, "rank", None))
    """
    assert run(ranks, script) == ["RankFailedError True 1\n", "KeyError True None\n"]
