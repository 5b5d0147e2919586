"""engine/data/data_wait.py: a run that waits for its data says so once, with what to change; any other says nothing."""

import logging
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from offloop.engine import DataBottleneck, Trainer
from offloop.engine.data.data_wait import DataWait, advise
from offloop.engine.testing import Recorder, tiny_batches, tiny_loader, tiny_trainer


class Slow(Dataset[tuple[Tensor, Tensor]]):
    """Takes a while for each sample."""

    def __init__(self, seconds: float = 0.012, size: int = 12) -> None:
        self.seconds, self.size = seconds, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        threading.Event().wait(self.seconds)
        return torch.full((8,), float(index)), torch.tensor(index % 3)


class SlowStep(Trainer):
    def training_step(self, batch: Any) -> Any:
        threading.Event().wait(0.12)
        return super().training_step(batch)


def bottlenecks(loader: Any, caplog: pytest.LogCaptureFixture, **more: Any) -> list[DataBottleneck]:
    recorder = Recorder()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "offloop"):
        tiny_trainer(more.pop("trainer_class", Trainer), **more).train(loader, epochs=3, callbacks=[recorder])
    found = recorder.of(DataBottleneck)
    assert len([each for each in caplog.records if "waits for its data" in each.message]) == len(found)
    return found


@pytest.mark.parametrize("knobs", [{}, {"accumulate_grad_batches": 2}], ids=["plain", "call by call"])
def test_a_run_that_waits_for_its_data_says_so_once(
    knobs: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    (event,) = bottlenecks(DataLoader(Slow(), batch_size=2), caplog, **knobs)
    assert event.epoch == 0
    assert event.batch == 6
    assert 0.2 < event.share <= 1
    assert event.wait >= 0.024
    assert "less work for each sample" in event.advice[-1]
    assert "for each batch; what may help: " in caplog.text


def test_a_run_that_does_not_wait_for_its_data_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert not bottlenecks(tiny_loader(20), caplog)
    assert not bottlenecks(tiny_batches(20), caplog)
    assert not bottlenecks(DataLoader(Slow(size=8), batch_size=2), caplog, trainer_class=SlowStep)
    assert not bottlenecks(DataLoader(Slow(size=2), batch_size=2), caplog)  # its one batch says nothing


def test_validations_and_pauses_are_no_training() -> None:
    wait = DataWait()
    wait.begin(0.0, 10.0, set_aside=1.0)
    wait.batches, wait.rest = 10, 0.3
    judge = {"on_cuda": False, "is_last": False}
    assert wait.judge([], now=11.0, set_aside=1.0, **judge) is not None
    assert wait.judge([], now=14.0, set_aside=1.0, **judge) is None  # 0.3 s of 4 s
    found = wait.judge([], now=14.0, set_aside=4.0, **judge)  # 3 s of them were a validation
    assert found is not None
    assert found.share == pytest.approx(0.3)
    assert found.wait == pytest.approx(0.03)


def test_short_waits_are_no_bottleneck() -> None:
    wait = DataWait()
    wait.begin(0.0, 10.0, set_aside=0.0)
    wait.batches, wait.rest = 1000, 0.5  # half the time, but half a millisecond each
    assert wait.judge([], now=11.0, set_aside=0.0, on_cuda=False, is_last=False) is None
    wait.batches, wait.rest = 10, 0.05  # half the time, but who notices 50 ms?
    assert wait.judge([], now=10.1, set_aside=0.0, on_cuda=False, is_last=False) is None


@pytest.mark.parametrize(
    ("persistent", "is_last", "is_said"), [(False, False, True), (True, False, False), (False, True, False)]
)
def test_workers_that_start_anew_each_epoch_are_named(persistent: bool, is_last: bool, is_said: bool) -> None:
    loader = DataLoader(Slow(), num_workers=2, persistent_workers=persistent)
    wait = DataWait()
    wait.begin(0.5, 10.0, set_aside=0.0)
    wait.batches = 10
    found = wait.judge(loader, now=11.0, set_aside=0.0, on_cuda=False, is_last=is_last)
    assert (found is not None) is is_said
    if found is not None:
        assert found.advice == ("persistent_workers=True (starting them takes 0.5 s each epoch)",)
        assert found.share == pytest.approx(0.5 / 1.5)


@pytest.mark.parametrize(
    ("knobs", "on_cuda", "cores", "first"),
    [
        ({}, False, 4, ["num_workers=3 (is 0), persistent_workers=True"]),
        ({}, True, 4, ["num_workers=3 (is 0), persistent_workers=True", "pin_memory=True"]),
        ({}, False, 1, []),
        ({}, False, 64, ["num_workers=8 (is 0), persistent_workers=True"]),
        ({"num_workers": 1}, False, 4, ["num_workers=3 (is 1)"]),
        ({"num_workers": 1}, False, 2, ["prefetch_factor=4 (is 2), if some samples take longer than others"]),
        ({"num_workers": 1, "prefetch_factor": 6}, False, 2, []),
        ({"num_workers": 1, "prefetch_factor": 6}, True, 2, ["pin_memory=True"]),
    ],
    ids=str,
)
def test_advice_fits_the_loader(knobs: dict[str, Any], on_cuda: bool, cores: int, first: list[str]) -> None:
    *found, last = advise(DataLoader(Slow(), **knobs), on_cuda=on_cuda, cores=cores)
    assert found == first
    assert last.startswith("less work for each sample")


def test_advice_for_what_is_no_dataloader() -> None:
    assert advise([1], on_cuda=False) == [
        "load ahead in the background: list is no DataLoader(num_workers=...)"
    ]
