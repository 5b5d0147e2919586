"""callbacks/weight_average.py: the average is torch's, validations use it, and training never notices."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from interruptions import StopAfter
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from offloop.callbacks import EarlyStopping, ModelCheckpoint
from offloop.callbacks.weight_average import WeightAverage
from offloop.engine import (
    Callback,
    ConfigError,
    ModelRegistry,
    Run,
    StepPoint,
    Trainer,
    TrainStart,
    ValidationEnd,
    ValidationStart,
    WeightsError,
    decides,
    in_step,
    load_model,
)
from offloop.engine.testing import (
    FailingCallback,
    Recorder,
    SlowCallback,
    tiny_batches,
    tiny_model,
    tiny_trainer,
)

BATCHES = 4
DATA = tiny_batches(3)
State = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def with_buffers(seed: int = 0) -> torch.nn.Module:
    """Return a model with batch normalisation, the same for the same seed."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 3))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.5, 0.5, generator=generator)
    return model


def state_of(model: torch.nn.Module) -> State:
    return {name: each.detach().clone() for name, each in model.state_dict().items()}


def is_equal(state: State, other: State) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


class Snapshots(Callback):
    """Keeps the weights after each step, outside of validations."""

    def __init__(self) -> None:
        self.after: dict[int, State] = {}

    @in_step
    def after_step(self, point: StepPoint) -> None:
        self.after[point.step] = state_of(point.model)


class Watching(Trainer):
    """Keeps the weights that each validation sees."""

    seen: list[State]

    def validation_step(self, batch: Any) -> Any:
        if self.step in (self.fail_at, -self.fail_at):
            raise RuntimeError("the validation broke")
        self.seen.append(state_of(self.model))
        return super().validation_step(batch)

    fail_at = 0


def make(model: torch.nn.Module | None = None, **knobs: Any) -> Watching:
    trainer = tiny_trainer(Watching, model=model or with_buffers(), lr=0.1, **knobs)
    assert isinstance(trainer, Watching)
    trainer.seen = []
    return trainer


def train(*callbacks: Callback, trainer: Watching | None = None, **limits: Any) -> Watching:
    trainer = trainer or make()
    val = limits.pop("val", tiny_batches(1, seed=1))
    trainer.train(tiny_batches(BATCHES), val, callbacks=callbacks, **(limits or {"epochs": 3}))
    return trainer


def swa_of_floats(mine: Any, theirs: Any, count: Any) -> None:
    """Average as torch does, where it does: its update raises for integer buffers."""
    if mine[0].is_floating_point():
        get_swa_multi_avg_fn()(mine, theirs, count)


def average_by_hand(kind: str, decay: Any, states: list[State], use_buffers: bool) -> State:
    """Return what torch's AveragedModel makes of these states."""
    live = with_buffers()
    function = get_ema_multi_avg_fn(decay) if kind == "ema" else swa_of_floats
    averaged = AveragedModel(live, multi_avg_fn=function, use_buffers=use_buffers)
    for state in states:
        live.load_state_dict(state)
        averaged.update_parameters(live)
    return state_of(averaged.module)


def floats_of(state: State) -> State:
    return {name: each for name, each in state.items() if each.is_floating_point()}


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        pytest.param({"decay": 0.9}, range(1, 13), id="ema"),
        pytest.param({"decay": 0.5, "every_n_steps": 3}, [3, 6, 9, 12], id="ema-every-3"),
        pytest.param({"decay": 0.9, "start_step": 5}, range(6, 13), id="ema-from-step"),
        pytest.param({"kind": "swa"}, [4, 8, 12], id="swa-each-epoch"),
        pytest.param({"kind": "swa", "start_epoch": 1}, [8, 12], id="swa-from-epoch"),
        pytest.param({"kind": "swa", "every_n_steps": 2, "start_step": 4}, [6, 8, 10, 12], id="swa-every-2"),
    ],
)
def test_average_is_torchs_bit_for_bit(arguments: dict[str, Any], steps: Any, use_buffers: bool) -> None:
    snapshots, average = Snapshots(), WeightAverage(**arguments, use_buffers=use_buffers)
    train(snapshots, average)
    states = [snapshots.after[step] for step in steps]
    expected = average_by_hand(average.kind, average.decay, states, use_buffers)
    mine = state_of(average.averaged_model)
    assert average.updates == len(states)
    assert is_equal(floats_of(mine), floats_of(expected))
    assert not is_equal(floats_of(mine), floats_of(states[-1]))


def test_decay_may_be_a_function_of_the_updates() -> None:
    def decay(updates: int) -> float:
        asked.append(updates)
        return (1 + updates) / (10 + updates)

    asked: list[int] = []
    snapshots, average = Snapshots(), WeightAverage(decay=decay)
    train(snapshots, average)
    states = [floats_of(snapshots.after[step]) for step in range(1, 13)]
    expected = {name: each.clone() for name, each in states[0].items()}
    for updates, state in enumerate(states[1:], 1):
        for name, each in expected.items():
            each.lerp_(state[name], 1 - (1 + updates) / (10 + updates))
    assert asked == list(range(1, 12))
    mine = floats_of(state_of(average.averaged_model))
    weights = [name for name in expected if name in dict(average.averaged_model.named_parameters())]
    assert weights
    for name in weights:
        torch.testing.assert_close(mine[name], expected[name])


@pytest.mark.parametrize("bad", [1, 1.5, -0.1, "0.9", True, None])
def test_function_that_returns_no_decay_ends_the_run(bad: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"after 1 updates it returned {bad!r}")):
        train(WeightAverage(decay=lambda updates: bad))


def test_counters_are_taken_over_not_averaged() -> None:
    average = WeightAverage(decay=0.9)
    train(average)
    assert average.averaged_model.state_dict()["1.num_batches_tracked"] == 3 * BATCHES


@pytest.mark.parametrize("use_buffers", [True, False])
def test_validation_runs_with_the_average_and_training_does_not(use_buffers: bool) -> None:
    snapshots, average = Snapshots(), WeightAverage(decay=0.7, use_buffers=use_buffers)
    trainer = train(snapshots, average)
    alone = Snapshots()
    without = train(alone)
    assert [is_equal(snapshots.after[step], alone.after[step]) for step in alone.after] == [True] * 12
    assert is_equal(state_of(trainer.model), state_of(without.model))
    for epoch, seen in enumerate(trainer.seen, 1):
        states = [alone.after[step] for step in range(1, epoch * BATCHES + 1)]
        expected = average_by_hand("ema", 0.7, states, use_buffers)
        if not use_buffers:  # the model's own
            expected |= {name: states[-1][name] for name in expected if "running" in name}
        assert is_equal(floats_of(seen), floats_of(expected))
        assert not is_equal(floats_of(seen), floats_of(states[-1]))


@pytest.mark.parametrize("several", [False, True])
def test_both_are_validated_and_the_average_decides(several: bool) -> None:
    model = tiny_model()
    average = WeightAverage(decay=0.9, validate="both")
    trainer = tiny_trainer(model=model)
    loader: Any = {"fit": DATA[:1], "new": DATA[1:]} if several else DATA
    result = trainer.train(DATA, loader, epochs=2, metrics=["accuracy"], callbacks=[average])
    live = trainer.evaluate(loader, metrics=["accuracy"])
    averaged = tiny_trainer(model=average.averaged_model).evaluate(loader, metrics=["accuracy"])
    for key in live:
        assert result.metrics[key] == averaged[key] != live[key] or "accuracy" in key
        assert result.metrics[key.replace("val_", "val_live_")] == live[key]
    assert result.best is not None and result.best.monitor == next(iter(live)).replace("accuracy", "loss")
    assert result.history[0].metrics.keys() >= result.metrics.keys()


def test_both_count_in_the_length_of_a_validation() -> None:
    recorder = Recorder()
    tiny_trainer(callbacks=[recorder, WeightAverage(validate="both")]).train(DATA, DATA, epochs=1)
    (start,), (end,) = recorder.of(ValidationStart), recorder.of(ValidationEnd)
    assert (start.batches, end.samples) == (2 * len(DATA), sum(len(batch[0]) for batch in DATA))


def test_a_loader_called_live_beside_both_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"val_loader has the name 'live'.*rename the loader"):
        tiny_trainer().train(DATA, {"live": DATA}, epochs=1, callbacks=[WeightAverage(validate="both")])


def test_validate_false_leaves_validations_alone() -> None:
    snapshots = Snapshots()
    trainer = train(snapshots, WeightAverage(decay=0.7, validate=False))
    assert is_equal(trainer.seen[-1], snapshots.after[12])


def test_validation_before_the_first_update_sees_the_weights_in_training() -> None:
    snapshots = Snapshots()
    trainer = train(snapshots, WeightAverage(decay=0.7, start_epoch=1))
    assert is_equal(trainer.seen[0], snapshots.after[4])
    assert not is_equal(trainer.seen[1], snapshots.after[8])


class StopInValidation(Callback):
    """Stops the run from inside a validation."""

    @in_step
    def before_validation(self, point: StepPoint) -> None:
        point.run.stop_nowait("in the middle of it")


class FailHook(Callback):
    """Fails at a validation's hook, after those of the callbacks before it."""

    def __init__(self, point: str) -> None:
        self.point = point

    @in_step
    def before_validation(self, point: StepPoint) -> None:
        if self.point == point.name:
            raise RuntimeError("the hook broke")

    @in_step
    def after_validation(self, point: StepPoint) -> None:
        if self.point == point.name:
            raise RuntimeError("the hook broke")


def test_stopped_validation_gives_the_weights_back() -> None:
    snapshots = Snapshots()
    trainer = train(snapshots, WeightAverage(decay=0.5), StopInValidation())
    assert trainer.last_run is not None and trainer.last_run.result.status == "stopped"
    assert (trainer.seen, list(snapshots.after)) == ([], [1, 2, 3, 4])
    assert is_equal(state_of(trainer.model), snapshots.after[4])


def test_failed_validation_gives_the_weights_back() -> None:
    snapshots, trainer = Snapshots(), make()
    trainer.fail_at = 4
    with pytest.raises(RuntimeError, match="the validation broke"):
        train(snapshots, WeightAverage(decay=0.5), trainer=trainer)
    assert is_equal(state_of(trainer.model), snapshots.after[4])


@pytest.mark.parametrize("point", ["before_validation", "after_validation"])
@pytest.mark.parametrize("is_first", [True, False])
def test_another_hook_that_fails_does_not_keep_the_weights(point: str, is_first: bool) -> None:
    snapshots, trainer = Snapshots(), make()
    pair: list[Callback] = [WeightAverage(decay=0.5), FailHook(point)]
    with pytest.raises(RuntimeError, match="the hook broke"):
        train(snapshots, *(pair[::-1] if is_first else pair), trainer=trainer)
    assert is_equal(state_of(trainer.model), snapshots.after[4])


@pytest.mark.parametrize("order", [1, -1])
def test_two_averages_of_which_one_is_validated(order: int) -> None:
    alone, snapshots = Snapshots(), Snapshots()
    train(alone)
    validated, other = WeightAverage(decay=0.5), WeightAverage(decay=0.9, validate=False)
    trainer = train(snapshots, *[validated, other][::order])
    assert is_equal(floats_of(trainer.seen[-1]), floats_of(state_of(validated.averaged_model)))
    assert not is_equal(floats_of(trainer.seen[-1]), floats_of(state_of(other.averaged_model)))
    assert all(is_equal(snapshots.after[step], state) for step, state in alone.after.items())
    assert is_equal(state_of(trainer.model), snapshots.after[3 * BATCHES])


def test_validations_with_two_averages_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="both want to run validations with their average: give validate=False"
    ):
        train(WeightAverage(decay=0.5), WeightAverage("swa"))


class WithStateThatIsNoWeight(torch.nn.Module):
    """Has spectral norms, whose vectors have length 1, a mask with infinities, and running statistics of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.new = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(8, 8))
        self.old = torch.nn.utils.spectral_norm(torch.nn.Linear(8, 3))
        self.register_buffer("mask", torch.full((8,), -torch.inf))
        self.register_buffer("running_size", torch.zeros(()))

    def forward(self, inputs: torch.Tensor) -> Any:
        if self.training:
            self.running_size.copy_(inputs.abs().mean())  # type: ignore[operator]  # a buffer
        return self.old(self.new(inputs).masked_fill(inputs == self.mask, 0.0))


@pytest.mark.parametrize("arguments", [{"decay": 0.7}, {"kind": "swa", "every_n_steps": 1}])
def test_what_is_no_weight_is_not_averaged(arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    snapshots, average = Snapshots(), WeightAverage(**arguments)
    trainer = make(WithStateThatIsNoWeight())
    train(snapshots, average, trainer=trainer)
    for epoch, seen in enumerate(trainer.seen, 1):
        live = snapshots.after[epoch * BATCHES]
        same = {name for name in seen if torch.equal(seen[name], live[name])}
        assert same == {
            "mask",
            "new.parametrizations.weight.0._u",
            "new.parametrizations.weight.0._v",
            "old.weight_u",
            "old.weight_v",
        }
        assert seen["old.weight_u"].norm() == pytest.approx(1.0)
    assert average.averaged_model.state_dict()["mask"].isinf().all()


def test_frozen_parts_stay_and_the_average_asks_for_no_gradients() -> None:
    model = with_buffers()
    model[0].weight.requires_grad_(False)  # type: ignore[index]  # a Sequential
    before = state_of(model)
    average = WeightAverage(decay=0.5)
    train(average, trainer=make(model))
    assert torch.equal(average.averaged_model.state_dict()["0.weight"], before["0.weight"])
    assert not any(each.requires_grad for each in average.averaged_model.parameters())


# The end -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["completed", "stopped", "failed"])
def test_apply_at_end(status: str) -> None:
    snapshots, average, trainer = Snapshots(), WeightAverage(decay=0.5, apply_at_end=True), make()
    others: list[Callback] = [StopInValidation()] if status == "stopped" else []
    if status == "failed":
        trainer.fail_at = 4
        with pytest.raises(RuntimeError):
            train(snapshots, average, trainer=trainer)
    else:
        train(snapshots, average, *others, trainer=trainer)
    last = snapshots.after[max(snapshots.after)]
    expected = last if status == "failed" else state_of(average.averaged_model)
    assert is_equal(floats_of(state_of(trainer.model)), floats_of(expected))
    assert is_equal(last, expected) == (status == "failed")


def test_without_apply_at_end_the_weights_in_training_stay() -> None:
    snapshots = Snapshots()
    trainer = train(snapshots, WeightAverage(decay=0.5))
    assert is_equal(state_of(trainer.model), snapshots.after[12])


# Resuming ------------------------------------------------------------------------------------------


class Scores(Callback):
    """Keeps what validations made."""

    def __init__(self) -> None:
        self.made: list[float] = []

    @decides
    def on_validation_end(self, event: ValidationEnd, run: Run) -> None:
        self.made.append(event.metrics["val_loss"])


@pytest.mark.parametrize("step", [1, 4, 6, 9])
@pytest.mark.parametrize(
    "arguments", [{"decay": 0.9, "apply_at_end": True}, {"kind": "swa"}, {"decay": 0.5, "use_buffers": False}]
)
def test_resumed_run_has_the_same_average_bit_for_bit(
    tmp_path: Path, arguments: dict[str, Any], step: int
) -> None:
    def run(name: str, *more: Callback, resume: Any = None) -> tuple[State, State, list[float]]:
        average, scores = WeightAverage(**arguments), Scores()
        trainer = make(run_dir=str(tmp_path), run_name=name)
        train(
            average,
            scores,
            ModelCheckpoint(save_best_only=True),
            *more,
            trainer=trainer,
            epochs=3,
            resume=resume,
        )
        return state_of(average.averaged_model), state_of(trainer.model), scores.made

    whole, weights, scores = run("whole")
    _, _, before = run("parts", StopAfter(step))
    resumed, resumed_weights, after = run("parts", resume="auto")
    assert is_equal(resumed, whole)
    assert is_equal(resumed_weights, weights)
    assert before + after == scores


def test_average_is_the_same_beside_slow_and_failing_observers() -> None:
    alone, beside = WeightAverage(decay=0.9), WeightAverage(decay=0.9)
    train(alone)
    train(SlowCallback(0.001), beside, FailingCallback())
    assert is_equal(state_of(alone.averaged_model), state_of(beside.averaged_model))


def test_next_run_begins_a_new_average() -> None:
    average = WeightAverage(decay=0.9)
    trainer = train(average, epochs=1)
    before = copy.deepcopy(average.averaged_model)
    train(average, trainer=trainer, epochs=1)
    assert average.updates == BATCHES
    assert not is_equal(state_of(before), state_of(average.averaged_model))


# The weights that a score belongs to ----------------------------------------------------------------


def best_of(tmp_path: Path, *callbacks: Callback, **knobs: Any) -> tuple[Watching, str, float]:
    """Train with checkpoints; return the trainer, and path and score of the best."""
    trainer = make(run_dir=str(tmp_path), run_name="run", **knobs)
    train(*callbacks, ModelCheckpoint(knobs.get("monitor", "val_loss")), trainer=trainer)
    assert trainer.last_run is not None
    best = trainer.last_run.result.best
    assert best is not None and best.path is not None
    return trainer, best.path, best.score


def loss_of(weights: Any) -> float:
    model = with_buffers()
    model.load_state_dict(weights)
    return tiny_trainer(model=model).evaluate(tiny_batches(1, seed=1))["val_loss"]


@pytest.mark.parametrize("use_buffers", [True, False])
def test_best_checkpoint_gives_the_weights_of_its_score(tmp_path: Path, use_buffers: bool) -> None:
    _, path, score = best_of(tmp_path, WeightAverage(decay=0.95, use_buffers=use_buffers))
    assert loss_of(load_model(path)) == score
    assert loss_of(load_model(path, key="average")) == score
    assert loss_of(load_model(path, key="model")) != score
    assert loss_of(load_model(str(tmp_path / "run@best"))) == score


def test_weights_in_training_are_those_of_a_metric_of_training(tmp_path: Path) -> None:
    trainer, path, _ = best_of(tmp_path, WeightAverage(decay=0.95), monitor="train_loss")
    assert is_equal(load_model(path), load_model(path, key="model"))
    assert is_equal(load_model(path, key="model"), state_of(trainer.model))


def test_average_that_is_not_validated_can_be_loaded(tmp_path: Path) -> None:
    average = WeightAverage(decay=0.95, validate=False)
    _, path, score = best_of(tmp_path, average)
    assert loss_of(load_model(path)) == loss_of(load_model(path, key="model")) == score
    assert is_equal(load_model(path, key="average"), state_of(average.averaged_model))


def test_second_average_has_a_key_of_its_own(tmp_path: Path) -> None:
    first, second = WeightAverage(decay=0.9, validate=False), WeightAverage(decay=0.5)
    _, path, score = best_of(tmp_path, first, second)
    assert loss_of(load_model(path)) == loss_of(load_model(path, key="average_2")) == score
    assert is_equal(load_model(path, key="average"), state_of(first.averaged_model))


def test_checkpoint_before_the_first_update_has_the_weights_in_training(tmp_path: Path) -> None:
    _, path, score = best_of(tmp_path, WeightAverage(decay=0.9, start_epoch=9))
    assert loss_of(load_model(path)) == score
    with pytest.raises(WeightsError, match="holds no average: its weights are those of key='model'"):
        load_model(path, key="average")


def test_key_that_no_checkpoint_has_says_which_there_are(tmp_path: Path) -> None:
    _, path, _ = best_of(tmp_path, WeightAverage(decay=0.9))
    for key in ("ema", "optimizers", "average_2"):
        with pytest.raises(WeightsError, match="'model'"):
            load_model(path, key=key)


def test_run_that_begins_from_a_checkpoint_begins_with_the_weights_of_its_score(tmp_path: Path) -> None:
    _, path, _ = best_of(tmp_path, WeightAverage(decay=0.95))
    begun: list[State] = []

    class Look(Callback):
        @decides
        def on_train_start(self, event: TrainStart, run: Run) -> None:
            begun.append(state_of(run.trainer.model))

    make().train(tiny_batches(1), epochs=1, init_from=path, callbacks=[Look()])
    assert is_equal(begun[0], load_model(path, key="average"))


def test_registered_are_the_weights_of_the_score_or_those_that_are_asked_for(tmp_path: Path) -> None:
    _, path, score = best_of(tmp_path, WeightAverage(decay=0.95))
    registry = ModelRegistry(tmp_path / "models")
    registry.register(path, "net")
    registry.register(path, "net", key="model")
    assert loss_of(load_model("net:1", registry=tmp_path / "models")) == score
    assert is_equal(load_model("net:2", registry=tmp_path / "models"), load_model(path, key="model"))


@pytest.mark.parametrize("order", [1, -1])
def test_restore_best_gives_back_the_weights_of_the_score(order: int) -> None:
    """The average's, where validations run with it."""
    trainer, stopping = make(), EarlyStopping("val_loss", patience=9, restore_best=True)
    callbacks: list[Callback] = [WeightAverage(decay=0.9), stopping]
    train(*callbacks[::order], trainer=trainer, epochs=6)
    assert stopping.monitor.best == loss_of(state_of(trainer.model))


def test_restore_best_by_a_metric_of_training_gives_back_the_weights_in_training() -> None:
    snapshots, trainer = Snapshots(), make()
    stopping = EarlyStopping("train_loss", patience=9, restore_best=True)
    train(snapshots, WeightAverage(decay=0.9), stopping, trainer=trainer)
    assert is_equal(state_of(trainer.model), snapshots.after[stopping.best_step])


@pytest.mark.parametrize(
    "callbacks",
    [
        [WeightAverage(apply_at_end=True), EarlyStopping(restore_best=True)],
        [EarlyStopping(restore_best=True), EarlyStopping("train_loss", restore_best=True)],
        [WeightAverage(apply_at_end=True), WeightAverage("swa", apply_at_end=True, validate=False)],
    ],
    ids=["average-and-stopping", "two-stoppings", "two-averages"],
)
def test_two_that_say_what_the_model_is_in_the_end_are_refused(callbacks: list[Callback]) -> None:
    with pytest.raises(ConfigError, match="weights after the run"):
        train(*callbacks)


# Arguments -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"kind": "mean"}, "kind must be 'ema' or 'swa', got 'mean'"),
        (
            {"decay": 1.0},
            "decay must be a finite number above 0 and below 1, got 1.0; a function of the updates is legal, too",
        ),
        ({"decay": 0}, "decay must be a finite number above 0"),
        ({"decay": "0.9"}, "decay must be a finite number above 0"),
        ({"validate": "live"}, "validate must be True, False or 'both', got 'live'"),
        ({"kind": "swa", "decay": 0.9}, "decay is for EMA"),
        ({"every_n_steps": 0}, "every_n_steps must be a whole number of at least 1"),
        ({"start_step": -1}, "start_step must be a whole number of at least 0"),
        ({"start_epoch": 0.75}, "start_epoch must be a whole number of at least 0"),
        ({"start_epoch": None}, "start_epoch must be a whole number of at least 0"),
    ],
)
def test_wrong_argument_is_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        WeightAverage(**arguments)


def test_swa_needs_to_know_the_length_of_an_epoch() -> None:
    with pytest.raises(ConfigError, match="give every_n_steps="):
        make().train(iter(tiny_batches(2)), epochs=1, callbacks=[WeightAverage("swa")])


def test_there_is_no_average_before_a_run() -> None:
    with pytest.raises(RuntimeError, match="before a run has started"):
        WeightAverage().averaged_model  # noqa: B018 - it raises


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_update_does_not_synchronise_the_device(kind: Any) -> None:
    average = WeightAverage(kind, every_n_steps=1)

    class Strict(Callback):
        @in_step
        def after_step(self, point: StepPoint) -> None:
            if point.step > 2:
                torch.cuda.set_sync_debug_mode("error")

    class Relaxed(Callback):
        @in_step
        def after_step(self, point: StepPoint) -> None:
            torch.cuda.set_sync_debug_mode("default")

    trainer = make(device="cuda")
    try:
        train(Strict(), average, Relaxed(), trainer=trainer, max_steps=6, val=None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert average.updates == 6
