"""TrainerConfig: every knob, its unit and its legal range, checked once."""

import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, TypedDict

import msgspec

from offloop.engine import checks
from offloop.engine.argument_hints import ADVICE, PEER_SPELLINGS, PRECISIONS, hint
from offloop.engine.errors import ConfigError, nearest
from offloop.engine.monitor import Mode

if TYPE_CHECKING:
    import torch

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]

SWITCH_INTERVAL: Final = 50e-6
"""Seconds. Where another thread computes in Python, a shorter one no longer helps (`benchmarks/switch_interval.py`)."""

_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")  # a letter alone would be a drive
_SEEDS: Final = range(-(2**63), 2**64)  # what torch.manual_seed takes

TRAIN_ARGUMENTS: Final = (
    "epochs",
    "max_steps",
    "max_time",
    "metrics",
    "callbacks",
    "resume",
    "resume_lr",
    "init_from",
    "init_strict",
)
"""What `train()` takes beside the loaders: what to train on and how long."""
_GIVEN_TO_TRAIN: Final = ("train_loader", "val_loader", *TRAIN_ARGUMENTS)
_BESIDE_KNOBS: Final = ("model", "optimizer", "config", "loss", "scheduler", "callbacks")


class RemoteDirectory(msgspec.Struct, frozen=True):
    """Where runs are copied to, with what the store must know. `remote_dir="s3://..."` is short for it.

    Raises:
        ConfigError: The URL is none, or holds a password; or a value is out of its range.
    """

    url: str
    """Of the directory of runs, as fsspec takes it: `s3://bucket/runs`, `gs://...`, `file:///mnt/share/runs`."""
    storage_options: dict[str, Any] = {}
    """For the fsspec file system, like `{"endpoint_url": ...}`; not written into any file. Credentials are
    better left where the store's own tools look for them."""
    timeout: float = 300.0
    """Seconds that the end of a run waits for what is not uploaded yet; a cancelled one `drain_timeout` at most."""
    on_error: Literal["isolate", "raise"] = "isolate"
    """What an upload that fails does, after several tries: be an event and a log record, or end the run."""

    def __post_init__(self) -> None:
        if not isinstance(self.url, str) or not _URL.match(self.url):
            raise ConfigError(
                "remote_dir must be a URL like s3://bucket/runs or file:///mnt/share/runs, "
                f"got {self.url!r}; a plain path is what run_dir takes"
            )
        if re.search(r"://[^/@]*:[^/@]*@", self.url):
            raise ConfigError(
                "remote_dir holds a password: RemoteDirectory(url, storage_options=...) hides it"
            )
        if not isinstance(self.storage_options, dict):
            raise ConfigError(
                f"storage_options must be a dict for fsspec, got {type(self.storage_options).__name__}"
            )
        checks.number("timeout", self.timeout, above=0, unit="seconds")
        checks.choice("on_error", self.on_error, ("isolate", "raise"))

    def __repr__(self) -> str:
        return f"RemoteDirectory({self.url!r})"  # options may be secrets


class TrainerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How to train. Every field can be given to `Trainer` as a keyword.

    Raises:
        ConfigError: A value is out of its range; the text names the knob, the value and what is legal.
    """

    epochs: int | None = None
    """Default for `train(epochs=...)`: epochs in total."""
    max_steps: int | None = None
    """Default for `train(max_steps=...)`: optimizer steps in total."""
    max_time: float | None = None
    """Default for `train(max_time=...)`: seconds of training in total."""
    device: "str | torch.device" = "auto"
    """`"auto"` (CUDA, then Apple's MPS, then CPU) or what `torch.device` takes."""
    precision: Precision = "32-true"
    """`"32-true"`, `"bf16-mixed"` (autocast) or `"16-mixed"` (autocast with dynamic loss scaling)."""
    accumulate_grad_batches: int = 1
    """Batches in an optimizer step."""
    gradient_clip_val: float | None = None
    """Clip gradients before each optimizer step; None for not at all."""
    gradient_clip_algorithm: Literal["norm", "value"] = "norm"
    """Clip the total norm, or each value."""
    on_nonfinite: Literal["raise", "warn", "skip_step"] = "raise"
    """What a loss of NaN or infinity does. `"skip_step"` leaves updates with a non-finite loss or gradient
    out; it has to read both before each step, so on CUDA it synchronises."""
    val_every_n_epochs: int | None = None
    """Validate after every n-th epoch; None means 1, or never where `val_every_n_steps` is given."""
    val_every_n_steps: int | None = None
    """Validate after every n-th optimizer step."""
    validate_at_start: bool = False
    """Validate before the first step of a new run, too, as a baseline; it belongs to no epoch."""
    limit_train_batches: int | float | None = None
    """Batches of an epoch: a number of them (int) or a share of the loader's length (float up to 1.0)."""
    limit_val_batches: int | float | None = None
    """Batches of a validation, likewise."""
    scheduler_interval: Literal["epoch", "step"] = "epoch"
    """Step `Trainer(scheduler=...)` after each epoch or after each optimizer step."""
    monitor: str | None = None
    """The metric that says which moment of the run was best; None: `val_loss` where there is a validation,
    else `train_loss`."""
    mode: Mode = "auto"
    """Whether less or more of `monitor` is better; `"auto"` knows it from the metric."""
    seed: int | None = None
    """Seed for torch's generators, set once before `TrainStart`; None touches no generator."""
    sampling: Literal["loader", "seeded"] = "loader"
    """`"loader"`: samples draw from the generators of the process that loads them. `"seeded"`: what a sample
    draws from torch's, Python's and NumPy's global generators follows from `seed`, the epoch and its place in
    the epoch, so that augmentation in loader workers is exact after a resume. Costs about 20 us a sample."""
    deterministic: bool = False
    """Use torch's deterministic algorithms for the length of the run. Process-wide."""
    tf32: bool | None = None
    """Let CUDA round the inputs of float32 matrix products and convolutions to TensorFloat-32, for the length of the
    run; False forbids it, None leaves torch as it is set. Process-wide."""
    compile: bool | dict[str, Any] = False
    """Compile the model in the training thread; a mapping is handed to `torch.compile`."""
    activation_checkpointing: str | type | Sequence[str | type] | None = None
    """Parts of the model whose activations are computed again in the backward pass instead of being kept: `"auto"`
    (its repeated blocks), or names of modules (`"encoder.layer.*"`) and classes. Same bits, less memory, more time."""
    freeze: str | Sequence[str] | None = None
    """Parameters that do not train, for the length of the run: names of modules or parameters, with `*` for any
    text. Neither weight decay nor momentum moves them, and normalization over them keeps its running statistics."""
    channels_last: bool = False
    """Keep images and the weights of convolutions with the channels innermost, as tensor cores want them."""
    run_dir: str | os.PathLike[str] | None = None
    """Directory for runs; each run owns `run_dir/<run_id>/`. None: `runs`, and only if a callback writes."""
    run_name: str | None = None
    """The run's id; None: time and random letters."""
    hyperparameters: Mapping[str, Any] | None = None
    """Facts of your own about the run, by name: numbers, strings, booleans, None, lists and mappings of them. They
    are in `run.hyperparameters`, `run.json`, `TrainStart.config` and every tracking logger, and change nothing."""
    remote_dir: str | RemoteDirectory | None = None
    """URL where each run is copied to as it grows, and fetched from to go on: `s3://bucket/runs`. Needs fsspec."""
    switch_interval: float | None = SWITCH_INTERVAL
    """Seconds for which a thread that computes in Python keeps the interpreter from others, for the length of the run.
    With Python's own 5 ms, training all but stops while a callback computes. None leaves it alone; a process that
    has set its own keeps it. Process-wide."""
    flush_interval: float = 0.05
    """Seconds between two hand-overs of events to the event loop."""
    drain_timeout: float = 30.0
    """Seconds that callbacks have to handle what is left after training, and again for `TrainEnd`."""

    def __post_init__(self) -> None:
        # Texts from here on: that is what run.json holds.
        # A device can only be given once torch is loaded. While another thread imports it, it may have no `device` yet.
        device_class = getattr(sys.modules.get("torch"), "device", None)
        if device_class is not None and isinstance(self.device, device_class):
            msgspec.structs.force_setattr(self, "device", str(self.device))
        if isinstance(self.run_dir, os.PathLike):
            msgspec.structs.force_setattr(self, "run_dir", os.fspath(self.run_dir))
        for name in (
            "epochs",
            "max_steps",
            "accumulate_grad_batches",
            "val_every_n_epochs",
            "val_every_n_steps",
        ):
            checks.whole_number(name, getattr(self, name), optional=name != "accumulate_grad_batches")
        checks.number("gradient_clip_val", self.gradient_clip_val, above=0, optional=True)
        for name in ("max_time", "switch_interval", "flush_interval", "drain_timeout"):
            optional = name in ("max_time", "switch_interval")
            checks.number(name, getattr(self, name), above=0, optional=optional, unit="seconds")
        for name in ("limit_train_batches", "limit_val_batches"):
            _check_limit(name, getattr(self, name))
        meant = PRECISIONS.get(str(self.precision).removeprefix("torch."))
        checks.choice(
            "precision",
            self.precision,
            ("32-true", "bf16-mixed", "16-mixed"),
            hint=f"; {meant!r} is meant" if meant else "",
        )
        checks.choice("gradient_clip_algorithm", self.gradient_clip_algorithm, ("norm", "value"))
        checks.choice("on_nonfinite", self.on_nonfinite, ("raise", "warn", "skip_step"))
        checks.choice("scheduler_interval", self.scheduler_interval, ("epoch", "step"))
        checks.choice("mode", self.mode, ("auto", "min", "max"))
        checks.choice("sampling", self.sampling, ("loader", "seeded"))
        if not isinstance(self.device, str):
            raise ConfigError(
                f'device must be a torch.device or a string like "auto", "cpu" or "cuda:0", got {self.device!r}'
            )
        if self.seed is not None and not (checks.is_whole_number(self.seed) and self.seed in _SEEDS):
            raise ConfigError(f"seed must be an int from -2**63 to 2**64 - 1, or None, got {self.seed!r}")
        if self.sampling == "seeded" and self.seed is None:
            raise ConfigError('sampling="seeded" derives what samples draw from the seed: give seed=...')
        if not isinstance(self.compile, bool | dict):
            raise ConfigError(
                f"compile must be a bool or a dict of torch.compile's arguments, got {self.compile!r}"
            )
        for name in ("deterministic", "channels_last", "validate_at_start"):
            checks.flag(name, getattr(self, name))
        checks.choice("tf32", self.tf32, (None, False, True))
        _check_patterns(
            "activation_checkpointing",
            self.activation_checkpointing,
            (str, type),
            '"auto", a name or a class of modules, a list of them, or None',
        )
        _check_patterns("freeze", self.freeze, (str,), "a name of parameters, a list of them, or None")
        for name in ("run_dir", "run_name", "monitor"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                what = "a path or a string" if name == "run_dir" else "a string"
                raise ConfigError(f"{name} must be {what} that is not empty, got {value!r}")
        if isinstance(self.run_dir, str) and _URL.match(self.run_dir):
            raise ConfigError(
                f"run_dir must be a local directory, where the run works; give remote_dir={self.run_dir!r} to "
                "have it copied there"
            )
        if self.hyperparameters is not None:
            plain = _plain_hyperparameters(self.hyperparameters)
            msgspec.structs.force_setattr(self, "hyperparameters", plain)
        if self.remote_dir is not None:
            self.remote  # noqa: B018 - checks it
        if self.run_name is not None and (self.run_name.startswith(".") or set(self.run_name) & set("/\\\0")):
            raise ConfigError(
                f"run_name names a directory: no slashes, no leading dot; got {self.run_name!r}"
            )

    @property
    def remote(self) -> RemoteDirectory | None:
        """`remote_dir` with everything that belongs to it."""
        given = self.remote_dir
        return given if isinstance(given, RemoteDirectory | None) else RemoteDirectory(given)

    def replace(self, **changes: Any) -> "TrainerConfig":
        """Return a copy with other values, checked like a new one.

        Raises:
            ConfigError: An unknown knob (the text names the nearest), or a value out of range.
        """
        known = self.__struct_fields__
        for name in changes:
            if name not in known:
                raise unknown_knob(name, known)
        return TrainerConfig(**{**msgspec.structs.asdict(self), **changes})

    def as_settings(self) -> dict[str, Any]:
        """Return the knobs as plain values, for events and files."""
        return {name: _plain(value) for name, value in msgspec.structs.asdict(self).items()}


class TrainerKnobs(TypedDict, total=False):
    """The fields of `TrainerConfig` as keywords, for editors and type checkers; what they mean stands there."""

    epochs: int | None
    max_steps: int | None
    max_time: float | None
    device: "str | torch.device"
    precision: Precision
    accumulate_grad_batches: int
    gradient_clip_val: float | None
    gradient_clip_algorithm: Literal["norm", "value"]
    on_nonfinite: Literal["raise", "warn", "skip_step"]
    val_every_n_epochs: int | None
    val_every_n_steps: int | None
    validate_at_start: bool
    limit_train_batches: int | float | None
    limit_val_batches: int | float | None
    scheduler_interval: Literal["epoch", "step"]
    monitor: str | None
    mode: Mode
    seed: int | None
    sampling: Literal["loader", "seeded"]
    deterministic: bool
    tf32: bool | None
    compile: bool | dict[str, Any]
    activation_checkpointing: str | type | Sequence[str | type] | None
    freeze: str | Sequence[str] | None
    channels_last: bool
    run_dir: str | os.PathLike[str] | None
    run_name: str | None
    hyperparameters: Mapping[str, Any] | None
    remote_dir: str | RemoteDirectory | None
    switch_interval: float | None
    flush_interval: float
    drain_timeout: float


def unknown_knob(name: str, known: Iterable[str]) -> ConfigError:
    """Return the error for a knob that `Trainer` does not have, naming the one that was probably meant."""
    known = sorted([*known, *_BESIDE_KNOBS, "batch_size"])  # in `train()` a DataLoader's is meant
    meant = {name, *PEER_SPELLINGS.get(name, "").split()}
    there = [each for each in _GIVEN_TO_TRAIN if each in meant]
    if there and meant.isdisjoint(known):
        here = there[0] if name == there[0] else f"{name}, here {there[0]},"
        return ConfigError(f"{here} belongs to train(): Trainer says how to train, train() what and how long")
    return ConfigError(f"there is no knob {name!r}: {hint(name, known)}")


def misplaced_argument(callee: str, name: str, legal: Iterable[str]) -> ConfigError:
    """Return the error for an argument that `train()` and its likes do not take."""
    legal, knobs = list(legal), [*TrainerConfig.__struct_fields__, *_BESIDE_KNOBS]
    meant = [name, *PEER_SPELLINGS.get(name, "").split()]
    if set(meant).isdisjoint(legal):
        for each in meant:
            if each in knobs:
                return ConfigError(
                    f"{name} says how to train: give it to Trainer({each}=...), not to {callee}()"
                )
        near = None if name in ADVICE else nearest(name, [*legal, *knobs])
        if near in knobs and near not in legal:
            return ConfigError(f"{callee}() takes no {name!r}: did you mean Trainer({near}=...)?")
    return ConfigError(f"{callee}() takes no {name!r}: {hint(name, legal)}")


def check_limits(epochs: int | None, max_steps: int | None, max_time: float | None) -> None:
    """Check the three limits of a run.

    Raises:
        ConfigError: None of them is given, or one is out of range.
    """
    checks.whole_number("epochs", epochs, optional=True)
    checks.whole_number("max_steps", max_steps, optional=True)
    checks.number("max_time", max_time, above=0, optional=True, unit="seconds")
    if epochs is None and max_steps is None and max_time is None:
        raise ConfigError("nothing says when to stop: give epochs, max_steps or max_time")


def _check_limit(name: str, value: object) -> None:
    if value is None or (checks.is_whole_number(value) and value >= 1):
        return
    if isinstance(value, float) and 0.0 < value <= 1.0:
        return
    raise ConfigError(
        f"{name} must be a number of batches (int of at least 1) or a share of them "
        f"(float above 0.0, up to 1.0), got {value!r}"
    )


def _check_patterns(name: str, value: object, kinds: tuple[type, ...], legal: str) -> None:
    if value is None:
        return
    given = value if isinstance(value, list | tuple) else [value]
    if not given or not all(isinstance(each, kinds) and each != "" for each in given):
        odd = next((each for each in given if not isinstance(each, kinds) or each == ""), value)
        shown = repr(odd) if isinstance(odd, str | int | list) else f"a {type(odd).__name__}"
        raise ConfigError(f"{name} must be {legal}, got {shown}")


def _plain_hyperparameters(given: object) -> dict[str, Any]:
    """Return a copy of the user's hyperparameters as plain values."""
    if not isinstance(given, Mapping):
        raise ConfigError(
            "hyperparameters must be a mapping of names to values, like vars(args) of argparse or "
            f"dataclasses.asdict(...), got {type(given).__name__}"
        )

    def plain(value: object, name: str) -> Any:
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str) or not key:
                    raise ConfigError(f"{name} has the key {key!r}; names must be strings that are not empty")
            return {key: plain(item, f"{name}[{key!r}]") for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item, f"{name}[{index}]") for index, item in enumerate(value)]
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise ConfigError(
            f"{name} must be a number, a string, a boolean, None, or a list or mapping of them, got "
            f"{value!r}; str(...) makes a text of anything"
        )

    result: dict[str, Any] = plain(given, "hyperparameters")
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, RemoteDirectory):
        return value.url
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, type):
        return value.__qualname__
    return value if isinstance(value, bool | int | float | str | None) else repr(value)
