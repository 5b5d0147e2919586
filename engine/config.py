"""TrainerConfig: the values of all knobs, checked once."""

import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal, Protocol, get_args

import msgspec

from offloop.engine import checks
from offloop.engine.argument_hints import ADVICE, PEER_SPELLINGS, PRECISIONS, hint, strategy_hint
from offloop.engine.errors import ConfigError, nearest
from offloop.engine.monitor import Mode, check_key

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]

SWITCH_INTERVAL: Final = 50e-6
"""Seconds. A shorter one no longer helps while another thread computes in Python (`benchmarks/switch_interval.py`)."""

LONGEST_RUN_NAME: Final = 200
"""Bytes of a run's id. File systems take 255, and put a suffix to names of files that are not complete."""

# A scheme of one letter would be a drive.
_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
# The seeds that torch.manual_seed takes.
_SEEDS: Final = range(-(2**63), 2**64)

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
"""Keyword arguments of `train()`."""
_GIVEN_TO_TRAIN: Final = ("train_loader", "val_loader", *TRAIN_ARGUMENTS)
_BESIDE_KNOBS: Final = ("model", "optimizer", "config", "loss", "scheduler", "callbacks")


class TorchDevice(Protocol):
    """A `torch.device`, for a module that loads no torch."""

    @property
    def type(self) -> str: ...

    @property
    def index(self) -> int | None: ...


class RemoteDirectory(msgspec.Struct, frozen=True):
    """A remote directory of runs, with the options of its store. `remote_dir="s3://..."` is short for it.

    Raises:
        ConfigError: The URL is invalid or contains a password, or a value is out of range.
    """

    url: str
    """URL of the directory, for fsspec: `s3://bucket/runs`, `gs://...`, `file:///mnt/share/runs`."""
    storage_options: dict[str, Any] = {}
    """Options of the fsspec file system, like `{"endpoint_url": ...}`; never written to a file. Leave credentials where
    the store's own tools look for them."""
    timeout: float = 300.0
    """Seconds, above 0, that the end of a run waits for remaining uploads; `drain_timeout` at most if cancelled."""
    on_error: Literal["isolate", "raise"] = "isolate"
    """What an upload that fails after several tries does: publish an event and log it, or end the run."""

    def __post_init__(self) -> None:
        if not isinstance(self.url, str) or not _URL.match(self.url):
            raise ConfigError(
                "remote_dir must be a URL like s3://bucket/runs or file:///mnt/share/runs, "
                f"got {self.url!r}; a plain path is what run_dir takes"
            )
        if re.search(r"://[^/@]*:[^/@]*@", self.url):
            raise ConfigError(
                "remote_dir contains a password: give it in RemoteDirectory(url, storage_options=...)"
            )
        if not isinstance(self.storage_options, dict):
            raise ConfigError(
                f"storage_options must be a dict for fsspec, got {type(self.storage_options).__name__}"
            )
        checks.number("timeout", self.timeout, above=0, unit="seconds")
        checks.choice("on_error", self.on_error, ("isolate", "raise"))

    def __repr__(self) -> str:
        # Without the options, which may be secrets.
        return f"RemoteDirectory({self.url!r})"


_AROUND_TRAINING: Final = frozenset(
    "device rank_timeout run_dir run_name remote_dir switch_interval flush_interval drain_timeout".split()
)
"""Knobs that say where and how smoothly a run goes, and not what it learns."""


_OF_RUNS: Final = frozenset("run_dir run_name tags note hyperparameters remote_dir".split())
"""Knobs that say nothing about training."""


class TrainerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How to train: the knobs of `Trainer`, checked on creation. `help(Trainer)` describes them.

    Raises:
        ConfigError: A value is out of range; the text names the knob, the value and what is legal.
    """

    # What a knob means, its unit and its range are in trainer_arguments.py.
    epochs: int | None = None
    max_steps: int | None = None
    max_time: float | None = None
    device: str | TorchDevice = "auto"
    precision: Precision = "32-true"
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: Literal["norm", "value"] = "norm"
    on_nonfinite: Literal["raise", "warn", "skip_step"] = "raise"
    val_every_n_epochs: int | None = None
    val_every_n_steps: int | None = None
    validate_at_start: bool = False
    limit_train_batches: int | float | None = None
    limit_val_batches: int | float | None = None
    scheduler_interval: Literal["epoch", "step"] = "epoch"
    monitor: str | None = None
    mode: Mode = "auto"
    seed: int | None = None
    sampling: Literal["loader", "seeded"] = "loader"
    deterministic: bool = False
    tf32: bool | None = None
    compile: bool | dict[str, Any] = False
    activation_checkpointing: str | type | Sequence[str | type] | None = None
    freeze: str | Sequence[str] | None = None
    channels_last: bool = False
    strategy: Literal["auto", "none", "ddp"] = "auto"
    rank_batches: Literal["split", "whole", "own"] = "split"
    sync_batchnorm: bool = False
    find_unused_parameters: bool = False
    rank_timeout: float = 20.0
    run_dir: str | os.PathLike[str] | None = None
    run_name: str | None = None
    tags: Sequence[str] = ()
    note: str = ""
    hyperparameters: Mapping[str, Any] | None = None
    remote_dir: str | RemoteDirectory | None = None
    switch_interval: float | None = SWITCH_INTERVAL
    flush_interval: float = 0.05
    drain_timeout: float = 30.0

    def __post_init__(self) -> None:
        self._keep_as_text()
        for name in ("epochs", "max_steps", "val_every_n_epochs", "val_every_n_steps"):
            checks.whole_number(name, getattr(self, name), optional=True)
        checks.whole_number("accumulate_grad_batches", self.accumulate_grad_batches)
        checks.number("gradient_clip_val", self.gradient_clip_val, above=0, optional=True)
        for name in ("max_time", "switch_interval"):
            checks.number(name, getattr(self, name), above=0, optional=True, unit="seconds")
        for name in ("flush_interval", "drain_timeout", "rank_timeout"):
            checks.number(name, getattr(self, name), above=0, unit="seconds")
        for name in ("limit_train_batches", "limit_val_batches"):
            _check_limit(name, getattr(self, name))
        meant = PRECISIONS.get(str(self.precision).removeprefix("torch."))
        hint = f"; {meant!r} is meant" if meant else ""
        checks.choice("precision", self.precision, get_args(Precision), hint=hint)
        checks.choice("gradient_clip_algorithm", self.gradient_clip_algorithm, ("norm", "value"))
        checks.choice("on_nonfinite", self.on_nonfinite, ("raise", "warn", "skip_step"))
        checks.choice("scheduler_interval", self.scheduler_interval, ("epoch", "step"))
        checks.choice("mode", self.mode, get_args(Mode))
        checks.choice("sampling", self.sampling, ("loader", "seeded"))
        checks.choice("strategy", self.strategy, ("auto", "none", "ddp"), hint=strategy_hint(self.strategy))
        checks.choice("rank_batches", self.rank_batches, ("split", "whole", "own"))
        checks.choice("tf32", self.tf32, (None, False, True))
        for name in (
            "deterministic",
            "channels_last",
            "validate_at_start",
            "sync_batchnorm",
            "find_unused_parameters",
        ):
            checks.flag(name, getattr(self, name))
        if not isinstance(self.device, str):
            raise ConfigError(
                f'device must be a torch.device or a string like "auto", "cpu" or "cuda:0", got {self.device!r}'
            )
        if self.seed is not None and (not checks.is_whole_number(self.seed) or self.seed not in _SEEDS):
            raise ConfigError(f"seed must be an int from -2**63 to 2**64 - 1, or None, got {self.seed!r}")
        if self.sampling == "seeded" and self.seed is None:
            raise ConfigError('sampling="seeded" derives what samples draw from the seed: give seed=...')
        if not isinstance(self.compile, bool | dict):
            raise ConfigError(
                f"compile must be a bool or a dict of torch.compile's arguments, got {self.compile!r}"
            )
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
        if self.monitor is not None:
            check_key(self.monitor)
        if isinstance(self.run_dir, str) and _URL.match(self.run_dir):
            raise ConfigError(
                f"run_dir must be a local directory; remote_dir={self.run_dir!r} copies runs there"
            )
        if self.run_name is not None:
            _check_run_name(self.run_name)
        msgspec.structs.force_setattr(self, "tags", checks.tags(self.tags))
        checks.note(self.note)
        if self.hyperparameters is not None:
            plain = _plain_hyperparameters(self.hyperparameters)
            msgspec.structs.force_setattr(self, "hyperparameters", plain)
        if self.remote_dir is not None:
            self.remote  # noqa: B018 - checks it

    def _keep_as_text(self) -> None:
        """Replace a `torch.device` and a path by their texts, which is what run.json contains."""
        # Only a process that has loaded torch can give a device. While another thread imports torch, the module may
        # not have its attribute `device` yet.
        device_class = getattr(sys.modules.get("torch"), "device", None)
        if device_class is not None and isinstance(self.device, device_class):
            msgspec.structs.force_setattr(self, "device", str(self.device))
        if isinstance(self.run_dir, os.PathLike):
            msgspec.structs.force_setattr(self, "run_dir", os.fspath(self.run_dir))

    @property
    def remote(self) -> RemoteDirectory | None:
        """`remote_dir` as a `RemoteDirectory`; None without one."""
        given = self.remote_dir
        return given if isinstance(given, RemoteDirectory | None) else RemoteDirectory(given)

    def replace(self, **changes: Any) -> "TrainerConfig":
        """Return a copy with other values, checked again.

        Raises:
            ConfigError: A knob is unknown (the text names the nearest), or a value is out of range.
        """
        known = self.__struct_fields__
        for name in changes:
            if name not in known:
                raise unknown_knob(name, known)
        return TrainerConfig(**{**msgspec.structs.asdict(self), **changes})

    def as_settings(self) -> dict[str, Any]:
        """Return the knobs as plain values, for events and files.

        The user's hyperparameters are told elsewhere; tags and note are labels, which may be edited later.
        """
        knobs = msgspec.structs.asdict(self)
        for name in ("hyperparameters", "tags", "note"):
            del knobs[name]
        return {name: _plain(value) for name, value in knobs.items()}

    def chosen(self) -> dict[str, Any]:
        """Return the knobs that may change what is learned and differ from their default, and the precision."""
        defaults = TrainerConfig().as_settings()
        return {
            name: value
            for name, value in self.as_settings().items()
            if name == "precision" or (value != defaults[name] and name not in _AROUND_TRAINING)
        }


def unknown_knob(name: str, known: Iterable[str]) -> ConfigError:
    """Return the error for a knob that `Trainer` does not have; it names the one that was probably meant."""
    # `batch_size` is left out of _BESIDE_KNOBS because in `train()` it means that of a DataLoader.
    known = sorted([*known, *_BESIDE_KNOBS, "batch_size"])
    meant = {name, *PEER_SPELLINGS.get(name, "").split()}
    there = [each for each in _GIVEN_TO_TRAIN if each in meant]
    if there and meant.isdisjoint(known):
        here = there[0] if name == there[0] else f"{name}, here {there[0]},"
        return ConfigError(f"{here} belongs to train(): Trainer says how to train, train() what and how long")
    return ConfigError(f"there is no knob {name!r}: {hint(name, known)}")


def misplaced_argument(callee: str, name: str, legal: Iterable[str]) -> ConfigError:
    """Return the error for an argument that `train()` or a similar method does not take."""
    legal, knobs = list(legal), [*TrainerConfig.__struct_fields__, *_BESIDE_KNOBS]
    meant = [name, *PEER_SPELLINGS.get(name, "").split()]
    if set(meant).isdisjoint(legal):
        for each in meant:
            if each in knobs:
                why = "is of all runs of a trainer" if each in _OF_RUNS else "says how to train"
                return ConfigError(f"{name} {why}: give it to Trainer({each}=...), not to {callee}()")
        near = None if name in ADVICE else nearest(name, [*legal, *knobs])
        if near in knobs and near not in legal:
            return ConfigError(f"{callee}() takes no {name!r}: did you mean Trainer({near}=...)?")
    return ConfigError(f"{callee}() takes no {name!r}: {hint(name, legal)}")


def check_limits(epochs: int | None, max_steps: int | None, max_time: float | None) -> None:
    """Check the three limits of a run.

    Raises:
        ConfigError: None is given, or one is out of range.
    """
    checks.whole_number("epochs", epochs, optional=True)
    checks.whole_number("max_steps", max_steps, optional=True)
    checks.number("max_time", max_time, above=0, optional=True, unit="seconds")
    if epochs is None and max_steps is None and max_time is None:
        raise ConfigError("nothing says when to stop: give epochs, max_steps or max_time")


def _check_run_name(name: str) -> None:
    if name.startswith(".") or set(name) & set("/\\"):
        raise ConfigError(f"run_name names a directory: no slashes, no leading dot; got {name!r}")
    checks.visible_text("run_name", name, at_most=LONGEST_RUN_NAME)
    if name != name.strip():
        raise ConfigError(f"run_name must not begin or end with a space, got {name!r}")
    if (size := len(name.encode())) > LONGEST_RUN_NAME:
        raise ConfigError(
            f"run_name names a directory: at most {LONGEST_RUN_NAME} bytes in UTF-8, got {size} in {name!r}"
        )


def _check_limit(name: str, value: object) -> None:
    is_count = checks.is_whole_number(value) and value >= 1
    is_share = isinstance(value, float) and 0.0 < value <= 1.0
    if not (value is None or is_count or is_share):
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
    """Return a copy of the user's hyperparameters, as plain values."""
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
            f"{value!r}; str(...) turns anything into a string"
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
