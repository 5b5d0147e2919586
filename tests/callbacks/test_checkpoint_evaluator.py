"""callbacks/checkpoint_evaluator.py: real checkpoints and processes, each of which imports torch for a second."""

import json
import os
import random
import signal
from pathlib import Path
from typing import Any, cast

import anyio
import pytest
import torch
from torch.nn.utils import parametrizations

from offloop.callbacks import (
    CheckpointEvaluator,
    LearningCurves,
    MetricLogger,
    ModelCheckpoint,
    WeightAverage,
)
from offloop.engine import (
    Callback,
    CallbackFailed,
    CheckpointReader,
    CheckpointSaved,
    ConfigError,
    Evaluated,
    Preempted,
    Run,
    RunResult,
    load_model,
)
from offloop.engine.testing import Recorder, tiny_batches, tiny_model, tiny_trainer
from offloop.engine.weights.structure import pack_structure, unpack_structure
from tests.callbacks.test_model_checkpoint import WaitForDisk

STEPS = (2, 4, 6, 8, 10)
"""Of the checkpoints: each epoch has two."""


def evaluate(model: torch.nn.Module) -> dict[str, Any]:
    """A figure that only these weights have, one that is drawn, and what the model is like."""
    (inputs, targets), *_ = tiny_batches(1, batch_size=64, seed=7)
    assert not model.training and not torch.is_grad_enabled()
    return {
        "loss": torch.nn.functional.cross_entropy(model(inputs), targets),
        "drawn": torch.rand(()) + random.random(),
        "threads": torch.get_num_threads(),
        "pid": os.getpid(),
    }


def train(
    tmp_path: Path, evaluator: CheckpointEvaluator, *more: Callback, epochs: int = 5, **knobs: Any
) -> tuple[RunResult, Recorder]:
    recorder = Recorder()
    resume = knobs.pop("resume", None)
    trainer = tiny_trainer(run_dir=str(tmp_path), run_name="run", lr=0.3, **knobs)
    keeps = ModelCheckpoint(monitor="eval_loss", save_top_k=2)
    callbacks = [recorder, WaitForDisk(), keeps, evaluator, *more]
    return trainer.train(tiny_batches(2), epochs=epochs, callbacks=callbacks, resume=resume), recorder


def on_disk(tmp_path: Path) -> list[int]:
    return [each.step for each in CheckpointReader(tmp_path / "run").checkpoints()]


class Opens(Callback):
    """Lets the evaluation begin only when the last checkpoint is durable: all of them wait until then."""

    def __init__(self, gate: Path) -> None:
        self.gate = gate

    def on_checkpoint_saved(self, event: CheckpointSaved, run: Run) -> None:
        if event.saved_step == STEPS[-1]:
            self.gate.write_text("go")


def test_checkpoints_are_evaluated_beside_training_and_the_best_is_chosen_by_that(tmp_path: Path) -> None:
    logger, curves = MetricLogger(), LearningCurves()
    result, recorder = train(tmp_path, CheckpointEvaluator(evaluate), logger, curves)
    assert result.callback_errors == {}
    found = recorder.of(Evaluated)
    assert [each.of_step for each in found] == list(STEPS)
    assert [each.of_epoch for each in found] == [0, 1, 2, 3, 4]
    assert {each.metrics["eval_threads"] for each in found} == {1.0}
    (pid,) = {each.metrics["eval_pid"] for each in found}
    assert pid != os.getpid()
    losses = [each.metrics["eval_loss"] for each in found]
    # The weights are those of the checkpoint: two of them are still on disk
    assert result.best is not None and result.best.path is not None
    loaded = load_model(result.best.path, into=tiny_model()).eval()
    with torch.no_grad():
        assert float(evaluate(loaded)["loss"]) == pytest.approx(result.best.score, abs=1e-6)
    assert result.best.score == min(losses)
    assert result.best.step == STEPS[losses.index(min(losses))]
    # Everywhere at the step of its checkpoint
    assert result.to_columns()["eval_loss"] == losses
    assert result.metrics["eval_loss"] == losses[-1]
    again = RunResult.load(tmp_path / "run")
    assert again.to_columns()["eval_loss"] == losses and again.metrics["eval_loss"] == losses[-1]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row] == [
        *zip(STEPS, losses, strict=True)
    ]
    assert curves._curves["eval_loss"].points() == ([*map(float, STEPS)], losses)


def test_the_choice_is_the_same_however_slow_the_evaluation_is(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    opened: list[str] = []

    def slow(model: torch.nn.Module) -> dict[str, Any]:
        if not opened:
            opened.append(gate.read_text())
        return evaluate(model)

    fast, seen = train(tmp_path / "fast", CheckpointEvaluator(evaluate), seed=3)
    late, seen_late = train(tmp_path / "slow", CheckpointEvaluator(slow), Opens(gate), seed=3)
    figures = [
        [
            {name: each.metrics[name] for name in ("eval_loss", "eval_drawn")}
            for each in recorder.of(Evaluated)
        ]
        for recorder in (seen, seen_late)
    ]
    assert figures[0] == figures[1]
    assert fast.best is not None and late.best is not None
    assert (fast.best.step, fast.best.score) == (late.best.step, late.best.score)
    assert on_disk(tmp_path / "fast") == on_disk(tmp_path / "slow")


def test_every_second_checkpoint_is_evaluated_only(tmp_path: Path) -> None:
    result, recorder = train(tmp_path, CheckpointEvaluator(evaluate, every=2))
    assert [each.saved_step for each in recorder.of(CheckpointSaved) if each.to_evaluate] == [4, 8]
    assert [each.of_step for each in recorder.of(Evaluated)] == [4, 8]
    assert result.best is not None and result.best.step in (4, 8)


def test_a_failing_evaluation_is_reported_and_not_chosen(tmp_path: Path) -> None:
    counted: list[int] = []

    def fails(model: torch.nn.Module) -> dict[str, Any]:
        counted.append(0)
        # The later, the better; the last one fails
        if len(counted) == 5:
            raise ValueError("no data")
        return {"loss": -len(counted)}

    result, recorder = train(tmp_path, CheckpointEvaluator(fails))
    (failed,) = recorder.of(CallbackFailed)
    assert "ValueError: no data" in failed.error and "in fails" in failed.traceback
    assert [each.error for each in recorder.of(Evaluated)] == [None] * 4 + ["ValueError: no data"]
    assert result.best is not None and result.best.step == 8


def test_what_a_killed_process_left_is_evaluated_by_the_run_that_continues(tmp_path: Path) -> None:
    counted: list[int] = []

    def dies(model: torch.nn.Module) -> dict[str, Any]:
        counted.append(0)
        if len(counted) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return evaluate(model)

    first, recorder = train(tmp_path, CheckpointEvaluator(dies))
    assert first.status == "completed"
    assert first.callback_errors["CheckpointEvaluator"][0].count("SIGKILL") == 1
    assert [each.of_step for each in recorder.of(Evaluated)] == [2, 4]
    left = [step for step in on_disk(tmp_path) if step > 4]
    result, recorder = train(tmp_path, CheckpointEvaluator(evaluate), epochs=6, resume="last")
    assert [each.of_step for each in recorder.of(Evaluated)] == [*left, 12]
    assert not result.callback_errors
    judged = {
        each.step: each.metrics["eval_loss"] for each in CheckpointReader(tmp_path / "run").checkpoints()
    }
    assert result.best is not None and result.best.score == min(judged.values())


def test_the_end_waits_no_longer_than_it_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    hangs = CheckpointEvaluator(lambda model: {"loss": gate.read_text()}, drain_timeout=0)
    result, _ = train(tmp_path, hangs)
    assert result.status == "completed" and result.best is None
    assert "not evaluated: the checkpoints of steps 2, 4, 6, 8, 10" in caplog.text


def test_a_signal_leaves_evaluations_to_the_run_that_continues(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)

    class Interrupts(Callback):
        def on_checkpoint_saved(self, event: CheckpointSaved, run: Run) -> None:
            if event.saved_step == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    hangs = CheckpointEvaluator(lambda model: {"loss": gate.read_text()})
    with pytest.raises(Preempted):
        train(tmp_path, hangs, Interrupts(), epochs=1_000)
    result = RunResult.load(tmp_path / "run")
    assert (result.status, result.reason, result.callback_errors) == ("stopped", "SIGTERM", {})


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_it_serves_an_application_and_evaluates_the_averaged_weights(tmp_path: Path, backend: str) -> None:
    async def main() -> RunResult:
        trainer = tiny_trainer(run_dir=str(tmp_path), run_name="run", lr=0.3)
        callbacks = [WeightAverage(decay=0.5), ModelCheckpoint(), CheckpointEvaluator(evaluate)]
        return await trainer.train_async(tiny_batches(2), tiny_batches(1), epochs=2, callbacks=callbacks)

    result = anyio.run(main, backend=backend)
    with torch.no_grad():
        averaged = evaluate(load_model(str(tmp_path / "run"), into=tiny_model()).eval())["loss"]
        trained = evaluate(load_model(str(tmp_path / "run"), into=tiny_model(), key="model").eval())["loss"]
    assert result.metrics["eval_loss"] == pytest.approx(float(averaged), abs=1e-6)
    assert float(averaged) != pytest.approx(float(trained), abs=1e-6)


# The model as it goes there ----------------------------------------------------------------------


class Odd(torch.nn.Module):
    """Ties weights, computes a buffer that no checkpoint has, and has a function of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(8, 8)
        self.second = torch.nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.arange(8.0), persistent=False)
        self.register_buffer("offset", torch.arange(8.0))
        self.norm = torch.nn.BatchNorm1d(8)
        self.plain = torch.arange(3.0)
        self.function = lambda value: value * 2


def test_a_structure_has_no_weights_and_everything_else() -> None:
    torch.manual_seed(0)
    model: Any = Odd().half()
    wide = torch.nn.Linear(1_000, 1_000)
    model.add_module("wide", wide)
    data = pack_structure(cast("torch.nn.Module", torch.compile(model, backend="eager")))
    assert len(data) < 100_000
    made: Any = unpack_structure(data)
    assert type(made).__name__ == "Odd"
    assert made.second.weight is made.first.weight
    assert made.first.weight.dtype == torch.float16 and not made.first.weight.requires_grad
    assert torch.equal(made.scale, model.scale) and torch.equal(made.plain, model.plain)
    assert made.function(3) == 6
    assert made.norm.running_mean.shape == (8,)
    assert made.state_dict().keys() == model.state_dict().keys()
    made.load_state_dict(model.state_dict())
    assert torch.equal(made.offset, model.offset)


def make_normed() -> torch.nn.Module:
    model: Any = tiny_model()
    parametrizations.weight_norm(model[0])
    return cast("torch.nn.Module", model)


def test_a_model_that_cannot_be_pickled_is_named_and_made_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the model.*CheckpointEvaluator\(model=make_model\)"):
        train(tmp_path, CheckpointEvaluator(evaluate), model=make_normed())
    result, _ = train(tmp_path, CheckpointEvaluator(evaluate, model=make_normed), model=make_normed())
    assert not result.callback_errors and "eval_loss" in result.metrics


def returns(value: Any) -> CheckpointEvaluator:
    return CheckpointEvaluator(lambda model: value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5, 'must return figures by name, like {"accuracy": 0.9}; got 0.5'),
        ({}, "must return figures by name"),
        ({1: 0.5}, "must return figures by name, got the name 1"),
        ({"loss": "high"}, "must return numbers; 'loss' is a str: 'high'"),
        ({"loss": torch.zeros(2)}, "must return numbers; 'loss' is a Tensor"),
    ],
)
def test_what_is_no_figure_is_refused(tmp_path: Path, value: Any, text: str) -> None:
    evaluator = returns(value)
    evaluator.make_model = tiny_model
    trainer = tiny_trainer(run_dir=str(tmp_path), run_name="run")
    trainer.train(tiny_batches(1), epochs=1, callbacks=[ModelCheckpoint()])
    (info,) = CheckpointReader(tmp_path / "run").checkpoints()
    with pytest.raises(TypeError) as caught:
        evaluator._figures(info)
    assert text in str(caught.value)


async def later(model: torch.nn.Module) -> dict[str, float]:
    return {}


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: CheckpointEvaluator(cast("Any", later)), TypeError, "plain def"),
        (lambda: CheckpointEvaluator(tiny_model()), TypeError, "evaluate must be a function, got Sequential"),
        (lambda: CheckpointEvaluator(evaluate, model=tiny_model()), TypeError, "model must be a function"),
        (lambda: CheckpointEvaluator(evaluate, device="gpu0"), ConfigError, 'like "cpu" or "cuda:1"'),
        (lambda: CheckpointEvaluator(evaluate, every=0), ConfigError, "every must be"),
        (lambda: CheckpointEvaluator(evaluate, num_threads=0), ConfigError, "num_threads must be"),
        (lambda: CheckpointEvaluator(evaluate, drain_timeout=-1), ConfigError, "drain_timeout must be"),
    ],
)
def test_bad_arguments_are_refused(make: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert text in str(caught.value)


def test_what_cannot_work_is_refused_before_the_run(tmp_path: Path) -> None:
    here = CheckpointEvaluator(evaluate)
    here.runs_in = "here"
    with pytest.raises(ConfigError, match='CheckpointEvaluator needs runs_in="process"'):
        train(tmp_path, here)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device='cuda:0', but there is no CUDA device here"):
            train(tmp_path, CheckpointEvaluator(evaluate, device="cuda:0"))


def test_a_run_whose_evaluations_all_fail_says_that_it_has_no_best(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    result, _ = train(tmp_path, returns("no figures"))
    assert result.status == "completed" and result.best is None
    assert (
        "run run has no best checkpoint by eval_loss: it depends on evaluations, which failed with"
        in caplog.text
    )
    assert "TypeError: evaluate must return figures by name" in caplog.text
    assert repr(result).splitlines()[0].endswith("; errors in CheckpointEvaluator")


def test_a_figure_whose_name_tells_no_direction_needs_a_mode(tmp_path: Path) -> None:
    trainer = tiny_trainer(run_dir=str(tmp_path))
    callbacks = [ModelCheckpoint("eval_a"), CheckpointEvaluator(evaluate)]
    with pytest.raises(ConfigError) as caught:
        trainer.train(tiny_batches(2), epochs=1, callbacks=callbacks)
    assert str(caught.value) == (
        'monitor=\'eval_a\': its name does not tell whether less or more is better, give mode="min" or mode="max"'
    )


def test_a_run_without_checkpoints_says_that_there_was_nothing(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    trainer = tiny_trainer(run_dir=str(tmp_path))
    trainer.train(tiny_batches(2), epochs=1, callbacks=[CheckpointEvaluator(evaluate)])
    assert "CheckpointEvaluator had nothing to evaluate: the run saved no checkpoint" in caplog.text
