"""CheckpointEvaluator: evaluates checkpoints beside training, in a process of its own.

    training     step, step, checkpoint, step, step, checkpoint, step ...
    process                  CheckpointSaved ──> load, evaluate ──> Evaluated(of_step=...)

The checkpoint is kept until it has been judged, and the end of the run waits for that. So which one is chosen does not
depend on how long an evaluation takes.
"""

import inspect
import logging
import numbers
import random
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import torch

from offloop.engine import (
    Callback,
    CheckpointReader,
    CheckpointSaved,
    ConfigError,
    Evaluated,
    Metrics,
    RunHandle,
    TrainEnd,
    TrainerParts,
    TrainStart,
    checks,
    load_model,
)
from offloop.engine.argument_hints import explains_arguments
from offloop.engine.checkpoint import CheckpointInfo
from offloop.engine.monitor import EVALUATED
from offloop.engine.weights.structure import pack_structure, unpack_structure

logger = logging.getLogger("offloop")

DRAIN_TIMEOUT: Final = 600.0
"""Seconds that the end of a run waits for evaluations by default."""

Evaluate = Callable[[torch.nn.Module], Mapping[str, Any]]


class CheckpointEvaluator(Callback):
    """Calls a function with the model of each checkpoint, while training continues.

        def evaluate(model):
            return {"accuracy": accuracy(model, test_loader())}

        callbacks=[ModelCheckpoint(monitor="eval_accuracy"), CheckpointEvaluator(evaluate)]

    The function runs in a child process. It gets the model in eval mode, with the weights that validations use, without
    gradients and with random generators seeded for the step. What it returns is published as `Evaluated`, under names
    that begin with `eval_`: it belongs to the step of the checkpoint. `ModelCheckpoint(monitor="eval_...")` chooses the
    best by it.

    A run has at most one. A checkpoint that could not be evaluated is reported like any failure of a callback, and is
    not chosen; after ten in a row the evaluator is switched off.
    """

    runs_in: Literal["here", "process"] = "process"
    needs_run_dir = True

    @explains_arguments()
    def __init__(
        self,
        evaluate: Evaluate,
        *,
        every: int = 1,
        model: Callable[[], torch.nn.Module] | None = None,
        device: str | torch.device = "cpu",
        num_threads: int = 1,
        drain_timeout: float = DRAIN_TIMEOUT,
    ) -> None:
        """Choose what to evaluate, and where.

        Args:
            evaluate: Takes the model and returns figures by name: numbers, or tensors of one element. A plain function
                or callable object; it goes to the process once, with what it refers to. Load large data in it, when
                it is first called.
            every: Evaluate every n-th checkpoint, at least 1.
            model: Makes the model, in the process. None sends the structure of the trainer's model, without weights.
            device: Where the model is evaluated; best one that training does not use.
            num_threads: Threads of torch for it, at least 1. More of them share the cores with training.
            drain_timeout: Seconds that the end of the run waits for outstanding evaluations, at least 0. Checkpoints
                that are not evaluated by then cannot be chosen.

        Raises:
            TypeError: `evaluate` or `model` cannot be called, or has to be awaited.
            ConfigError: `device` is no device, or a number is out of range.
        """
        for name, given in (("evaluate", evaluate), ("model", model)):
            if given is None and name == "model":
                continue
            if not callable(given) or isinstance(given, torch.nn.Module):
                raise TypeError(f"{name} must be a function, got {type(given).__name__}")
            if inspect.iscoroutinefunction(given):
                raise TypeError(f"{name} must be a plain def: it runs in a thread of the process")
        checks.whole_number("every", every)
        checks.whole_number("num_threads", num_threads)
        checks.number("drain_timeout", drain_timeout, at_least=0, unit="seconds")
        try:
            self.device = torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ConfigError(f'device must be like "cpu" or "cuda:1", got {device!r}: {error}') from None
        self.evaluate = evaluate
        self.make_model = model
        self.evaluates_every = every
        self.num_threads = num_threads
        self.drain_timeout = drain_timeout
        self.reset()

    def reset(self) -> None:
        self._structure = b""
        self._seed = 0
        # The next three are of the process.
        self._model: torch.nn.Module | None = None
        self._evaluated: set[str] = set()
        self._has_seen_any = False

    def prepare(self, trainer: TrainerParts) -> None:
        if self.runs_in != "process":
            raise ConfigError(
                f'{type(self).__name__} needs runs_in="process": it sets the random generators, threads and weights '
                "of the process that it runs in"
            )
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"device={str(self.device)!r}, but there is no CUDA device here")
        self._seed = trainer.config.seed or 0
        if self.make_model is None:
            self._structure = pack_structure(trainer.model)

    def on_train_start(self, event: TrainStart, run: RunHandle) -> None:
        torch.set_num_threads(self.num_threads)
        if event.resumed_from is None:
            return
        assert run.dir is not None and self.evaluates_every is not None
        for info in CheckpointReader(run.dir).to_evaluate(self.evaluates_every):
            try:
                self._judge(info, run)
            except Exception:
                logger.exception("%s was not evaluated", info.name)

    def on_checkpoint_saved(self, event: CheckpointSaved, run: RunHandle) -> None:
        self._has_seen_any = True
        path = Path(event.path)
        if event.to_evaluate and path.name not in self._evaluated:
            self._judge(CheckpointReader(path.parent.parent).find(path), run)

    def on_train_end(self, event: TrainEnd, run: RunHandle) -> None:
        if not (self._has_seen_any or self._evaluated):
            logger.warning(
                "%s had nothing to evaluate: the run saved no checkpoint. Add ModelCheckpoint()",
                type(self).__name__,
            )

    def _judge(self, info: CheckpointInfo, run: RunHandle) -> None:
        """Evaluate a checkpoint, and publish what came of it."""
        began = time.perf_counter()
        metrics: dict[str, float] = {}
        failure: str | None = None
        try:
            metrics = self._figures(info)
        except BaseException as error:
            failure = traceback.format_exception_only(error)[-1].strip()
            raise
        finally:
            self._evaluated.add(info.name)
            run.publish(
                Evaluated(
                    path=str(info.path),
                    of_step=info.step,
                    of_epoch=info.manifest.epoch_of_step,
                    metrics=Metrics(metrics),
                    seconds=time.perf_counter() - began,
                    error=failure,
                )
            )

    def _figures(self, info: CheckpointInfo) -> dict[str, float]:
        if self._model is None:
            made = unpack_structure(self._structure) if self.make_model is None else self.make_model()
            self._model = made.to(self.device)
        model = load_model(info, into=self._model).eval()
        seed_generators((self._seed + info.step) % 2**63)
        with torch.no_grad():
            found = self.evaluate(model)
        if not isinstance(found, Mapping) or not found:
            raise TypeError(
                f'evaluate must return figures by name, like {{"accuracy": 0.9}}; got {found!r:.80}'
            )
        return {_prefixed(name): _number(name, value) for name, value in found.items()}


def seed_generators(seed: int) -> None:
    """Seed the generators of torch, Python and, if it is loaded, NumPy."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)


def _prefixed(name: object) -> str:
    if not isinstance(name, str) or not name:
        raise TypeError(f"evaluate must return figures by name, got the name {name!r}")
    return name if name.startswith(EVALUATED) else EVALUATED + name


def _number(name: str, value: Any) -> float:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return float(value)
    if isinstance(value, numbers.Real) or (hasattr(value, "__float__") and getattr(value, "size", 1) == 1):
        return float(value)
    raise TypeError(f"evaluate must return numbers; {name!r} is a {type(value).__name__}: {value!r:.80}")
