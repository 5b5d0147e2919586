"""The types of a run's state in a checkpoint, and the checks of a state before it is saved and before it is used.

Checksums find damage. They do not tell whether a run wrote the content: another program, another version or a
person may have written it, with correct checksums. `check_state` compares all fields with their types, and
`restoring` turns every failure while a part is restored into a `CheckpointError` that names the part.

Add new fields of the state here as `NotRequired`; otherwise older checkpoints are refused.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NotRequired, TypedDict, cast

import msgspec
import torch

from offloop.engine.checkpoint import CheckpointError, CheckpointIncompatibleError, UnserializableStateError
from offloop.engine.checkpoint.errors import UnsafeCheckpointError
from offloop.engine.checkpoint.layout import check_tensor
from offloop.engine.checkpoint.manifest import STATE
from offloop.engine.checkpoint.memory import is_out_of_memory
from offloop.engine.checkpoint.tree import TensorNode, encode, tensor_node
from offloop.engine.data.random_state import check_random_state
from offloop.engine.errors import ConfigError, OffloopError, WeightsMismatchError
from offloop.engine.training.model_modes import ModelModes

Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Number = float | int


GPU_GENERATOR_BYTES: Final = 64
"""Above the size of a device generator's state; a CPU generator's state has some thousands."""


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
    """The loader's state in early checkpoints, when an epoch had one pass."""

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
    """The state in a checkpoint. Fields that are not listed are not checked."""

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


HINTS: Final = {
    "schedulers": "a schedule saves the attributes of an object that it calls: give it a plain function or a closure",
    "model": "return tensors, numbers and strings from get_extra_state(); bytes fit as torch.frombuffer(...)",
    "loss": "return tensors, numbers and strings from get_extra_state(); bytes fit as torch.frombuffer(...)",
    "optimizers": "change what the optimizer's state_dict() returns, numpy arrays to lists or tensors",
    "callbacks": "change what the callback's state_dict() returns, numpy arrays to lists or tensors",
    "trainer": "change what the trainer's state_dict() returns, numpy arrays to lists or tensors",
}
"""Advice for a value that cannot be saved, by the first part of its path."""


def check_saveable(state: Mapping[str, Any]) -> None:
    """Check that a state can be saved, without copying tensors. Done once, at the first step.

    Raises:
        CheckpointError: A value can never be saved; the text has its path and what to do.
    """
    try:
        encode(state, _checked_node)
    except UnserializableStateError as error:
        part = error.path.lstrip(".").partition(".")[0]
        hint = HINTS.get(part, "keep it out of the state")
        raise CheckpointError(
            f"no checkpoint of this run can be saved: {error}; {hint}. To train without checkpoints, "
            'set on_error = "isolate" on the ModelCheckpoint'
        ) from error


def _checked_node(path: str, value: object) -> TensorNode | None:
    if not isinstance(value, torch.Tensor):
        return None
    check_tensor(path, value)
    return tensor_node("")


def check_state(state: object, checkpoint: Path) -> dict[str, Any]:
    """Check the types of all fields of a run's state, and return it.

    Raises:
        UnsafeCheckpointError: A field is missing or has another type; the text names file and field.
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
        # msgspec treats a tensor in the place of a mapping as one.
        raise UnsafeCheckpointError(checkpoint, STATE, "foreign", str(error)) from error
    with restoring(checkpoint, "random"):
        check_random_state(checked["random"])
    with restoring(checkpoint, "loader"):
        _check_generators(checked["loader"])
    return cast("dict[str, Any]", state)


def _check_generators(loader: Any) -> None:
    """Check that generators accept their states, because the failure would come only after the epoch's start."""
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
            # Samplers and descriptions belong to the user.
            elif name not in ("samplers", "description"):
                _check_generators(value)


@contextlib.contextmanager
def restoring(checkpoint: Path | str, part: str) -> Iterator[None]:
    """Turn errors of the block, which restores a part of the state, into ones that name the part.

    Raises:
        CheckpointIncompatibleError: The part belongs to another model, optimizer or callback.
        UnsafeCheckpointError: It is not what was saved.
    """
    try:
        yield
    except (CheckpointError, ConfigError, WeightsMismatchError):
        # Their texts already say what does not fit.
        raise
    except OSError:
        # The system refused, which is no property of the checkpoint.
        raise
    except (OffloopError, RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        # The part is whole but belongs to something else.
        raise CheckpointIncompatibleError(
            Path(checkpoint), f"{part} cannot be restored: {error}".rstrip(". \n"), _hint(part)
        ) from error
    except Exception as error:
        # Any error of torch, offloop or the user's load_state_dict.
        raise UnsafeCheckpointError(
            Path(checkpoint), f"{STATE}:{part}", "foreign", f"{type(error).__name__}: {error}"
        ) from error


def check_kinds(saved: object, live: object, where: str = "") -> None:
    """Compare the kinds of values in a saved state with those of the object that will load it.

    torch's schedulers and optimizers accept anything and fail in a later step. All numbers are one kind, and so are
    lists and tuples. None fits everything, because many states start as None.

    Raises:
        TypeError: A value has another kind; the text names it.
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
    """Compare an optimizer's saved state with the optimizer that will load it.

    Raises:
        TypeError: A setting of a group, or the state of a parameter, has another kind.
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
        return "Build what was saved, or start a new run from the weights alone with init_from="
    return "Build the run as before"


def _expect_instance(wanted: type, value: object) -> object:
    if isinstance(value, wanted):
        return value
    raise TypeError(f"Expected `{wanted.__name__}`, got `{type(value).__name__}`")
