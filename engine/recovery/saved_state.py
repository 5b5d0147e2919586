"""The types of a run's state as a checkpoint holds it, checked before anything of it is used.

Checksums find damage. They do not say that the content is what a run writes: another program, another version or
a person may have written it, with correct checksums. `check_state` compares every field with its type, and
`restoring` turns whatever goes wrong while a part is put back into a `CheckpointError` that names the part.

A new field of the state is added here as `NotRequired`, or older checkpoints are refused.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NotRequired, TypedDict, cast

import msgspec
import torch

from offloop.engine.checkpoint import CheckpointError, CheckpointIncompatibleError
from offloop.engine.checkpoint.errors import UnsafeCheckpointError
from offloop.engine.checkpoint.manifest import STATE
from offloop.engine.checkpoint.memory import is_out_of_memory
from offloop.engine.data.random_state import check_random_state
from offloop.engine.errors import ConfigError, OffloopError, WeightsMismatchError
from offloop.engine.training.model_modes import ModelModes

Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Number = float | int


GPU_GENERATOR_BYTES: Final = 64
"""More than the state of a generator on a device has; that of one on the CPU has some thousands."""


class OptimizerState(TypedDict):
    state: dict[Any, Any]
    param_groups: list[dict[str, Any]]


class Position(TypedDict):
    epoch: Count
    step: Count
    batch: Count
    epoch_batches: Count
    epoch_samples: Count
    epoch_first_step: Count
    validated_step: int
    last_lr: float


class MeansState(TypedDict):
    sums: dict[str, float]
    weights: dict[str, float]


class RandomState(TypedDict):
    torch: torch.Tensor
    python: tuple[int, list[Annotated[int, msgspec.Meta(ge=0, le=2**32)]], float | None]
    cuda: NotRequired[list[torch.Tensor]]
    numpy: NotRequired[tuple[str, torch.Tensor, Count, Count, float]]


class BeforeEpoch(TypedDict):
    random: RandomState
    first: NotRequired[RandomState]
    has_workers: bool
    generators: NotRequired[dict[str, torch.Tensor]]
    samplers: NotRequired[dict[str, Any]]


class LoaderNow(TypedDict):
    has_workers: bool
    generators: NotRequired[dict[str, torch.Tensor]]
    samplers: NotRequired[dict[str, Any]]
    read: NotRequired[Count]
    epoch: NotRequired[Count | None]
    description: NotRequired[dict[str, Any] | None]
    counters: NotRequired[dict[str, float]]
    contents: NotRequired[dict[str, int]]


class OnePass(TypedDict):
    """What checkpoints held before an epoch could have several passes."""

    before: BeforeEpoch | None
    now: LoaderNow


class SavedPass(TypedDict):
    loader: str
    given: Count
    is_done: bool
    before: BeforeEpoch | None
    now: NotRequired[LoaderNow]


class Passes(TypedDict):
    passes: list[SavedPass]
    loaders: dict[str, LoaderNow]
    validation: dict[str, LoaderNow]
    doubts: list[tuple[Literal["equivalent", "approximate"], str]]


class _LoaderOfOnePass(TypedDict):
    loader: OnePass


class _LoaderOfPasses(TypedDict):
    loader: Passes


class Made(TypedDict):
    optimizers: dict[str, list[dict[str, Any]]]
    schedulers: list[dict[str, Any]]


class SavedState(TypedDict):
    """What `state.capture` and the session put into a checkpoint. Fields that are not listed are not checked."""

    model: dict[str, Any]
    optimizers: dict[str, OptimizerState]
    schedulers: list[dict[Any, Any]]
    position: Position
    phase: Literal["before_epoch", "in_epoch", "after_epoch"]
    taken: float
    seconds: float
    means: MeansState
    epoch_metrics: dict[str, float]
    latest: dict[str, float]
    loss_scale: float
    frozen: list[str]
    random: RandomState
    environment: dict[str, str | bool | int | float | None]
    callbacks: dict[str, dict[Any, Any]]
    loader: dict[str, Any]
    history: list[str]
    best: dict[str, Any] | None
    scaler: NotRequired[dict[str, Any]]
    metrics: NotRequired[dict[str, Any]]
    trainer: NotRequired[dict[str, Any]]
    loss: NotRequired[dict[str, Any]]
    buffers: NotRequired[dict[str, torch.Tensor]]
    unsaved: NotRequired[list[str]]
    parameters: NotRequired[dict[str, list[list[str]]]]
    made: NotRequired[Made]
    steps_of: NotRequired[dict[str, Count]]
    modes: NotRequired[ModelModes]
    resume_lr: NotRequired[float]
    milestones: NotRequired[list[str]]


def check_state(state: object, checkpoint: Path) -> dict[str, Any]:
    """Return the state of a run, if each of its fields has the type that a run writes.

    Raises:
        UnsafeCheckpointError: A field is missing or of another type; the text names file and field.
    """
    try:
        checked = msgspec.convert(state, SavedState, dec_hook=_expect_instance)
        kind = _LoaderOfPasses if "passes" in checked["loader"] else _LoaderOfOnePass
        msgspec.convert({"loader": checked["loader"]}, kind, dec_hook=_expect_instance)
    except msgspec.ValidationError as error:
        detail, _, where = str(error).partition(" - at ")
        field = where.strip("`").removeprefix("$.")
        raise UnsafeCheckpointError(
            checkpoint, f"{STATE}:{field}" if field else STATE, "foreign", detail
        ) from error
    except (AttributeError, TypeError, RecursionError) as error:
        # msgspec takes a tensor that stands in the place of a mapping for one
        raise UnsafeCheckpointError(checkpoint, STATE, "foreign", str(error)) from error
    with restoring(checkpoint, "random"):
        check_random_state(checked["random"])
    with restoring(checkpoint, "loader"):
        _check_generators(checked["loader"])
    return cast("dict[str, Any]", state)


def _check_generators(loader: Any) -> None:
    """Raise if a generator would refuse its state: too late, once the loader's epoch has begun."""
    if isinstance(loader, list):
        for each in loader:
            _check_generators(each)
    elif isinstance(loader, dict):
        for name, value in loader.items():
            if name in ("random", "first") and value is not None:
                check_random_state(value)
            elif name == "generators":
                for state in value.values():
                    if state.numel() > GPU_GENERATOR_BYTES:
                        torch.Generator().set_state(state)
            elif name not in ("samplers", "description"):  # of the user's
                _check_generators(value)


@contextlib.contextmanager
def restoring(checkpoint: Path | str, part: str) -> Iterator[None]:
    """Name the part of the state that the block puts back, whatever goes wrong with it.

    Raises:
        CheckpointIncompatibleError: The part belongs to another model, optimizer or callback.
        UnsafeCheckpointError: It is not what was saved.
    """
    try:
        yield
    except (CheckpointError, ConfigError, WeightsMismatchError):
        # They say already what does not fit
        raise
    except OSError:
        # The system's refusal, which says nothing about the checkpoint
        raise
    except (OffloopError, RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise  # torch's word for it, on the host or a device
        # It is whole, and of something else
        raise CheckpointIncompatibleError(
            Path(checkpoint), f"{part} cannot be put back: {error}".rstrip(". \n"), _hint(part)
        ) from error
    except Exception as error:
        # A KeyError, TypeError, IndexError, MemoryError, ... of torch's, of ours, or of a user's load_state_dict
        raise UnsafeCheckpointError(
            Path(checkpoint), f"{STATE}:{part}", "foreign", f"{type(error).__name__}: {error}"
        ) from error


def check_kinds(saved: object, live: object, where: str = "") -> None:
    """Compare a saved state with that of the object that is to load it, where both have a value.

    torch's schedulers and optimizers take whatever they are given, and fail in a later step. Numbers are all of one
    kind, and so are lists and tuples; None fits everything, because many states begin as None.

    Raises:
        TypeError: A value is of another kind; the text names it.
    """
    if saved is None or live is None:
        return
    kinds: tuple[tuple[type, ...], ...] = (
        (torch.Tensor, bool, int, float, complex),
        (str,),
        (list, tuple),
        (Mapping,),
    )
    for kind in kinds:
        if isinstance(live, kind) and not isinstance(saved, kind):
            raise TypeError(f"{where or 'it'} is a {type(saved).__name__}, not a {type(live).__name__}")
    if isinstance(live, Mapping):
        assert isinstance(saved, Mapping)
        for name in live.keys() & saved.keys():
            check_kinds(saved[name], live[name], f"{where}.{name}" if where else str(name))
    elif isinstance(live, list | tuple) and live:
        assert isinstance(saved, list | tuple)
        for index, item in enumerate(saved):
            like = live[min(index, len(live) - 1)]
            check_kinds(item, like, f"{where}.{index}" if where else str(index))


def check_optimizer(saved: OptimizerState, optimizer: torch.optim.Optimizer) -> None:
    """Compare an optimizer's saved state with the optimizer that is to load it.

    Raises:
        TypeError: A setting of a group, or a value for a parameter, is of another kind.
    """
    for number, (group, live) in enumerate(zip(saved["param_groups"], optimizer.param_groups, strict=False)):
        settings = {name: value for name, value in live.items() if name != "params"}
        check_kinds(group, settings, f"group {number}")
        if not isinstance(group.get("params"), list):
            raise TypeError(f"group {number} has no list of parameters")
    for index, values in saved["state"].items():
        if type(index) is int and not isinstance(values, Mapping):
            raise TypeError(f"the state of parameter {index} is a {type(values).__name__}")


def check_schedule(saved: Mapping[Any, Any], scheduler: object) -> None:
    """Compare a schedule's saved state with the schedule that is to load it.

    Raises:
        TypeError: A value is of another kind, or stands where the schedule has a method.
    """
    live = scheduler.state_dict()  # type: ignore[attr-defined]  # every schedule has one
    check_kinds(saved, live)
    for name in saved.keys() - live.keys():
        if not isinstance(name, str) or callable(getattr(scheduler, name, None)):
            raise TypeError(f"{name!r} is nothing that a schedule has")


def _hint(part: str) -> str:
    if part.startswith(("model", "optimizers")):
        return "Make what was saved; or let init_from= begin a new run with the weights alone"
    return "Make the run as it was made before"


def _expect_instance(wanted: type, value: object) -> object:
    if isinstance(value, wanted):
        return value
    raise TypeError(f"Expected `{wanted.__name__}`, got `{type(value).__name__}`")
