"""Before a run: rank 0 decides, the others learn, and all make sure that they were started alike.

    rank 0                                        the others
    ──────                                        ──────────
    prepares the run
    announce(decision) ─────── plan ────────────> learn()
                                                  prepare the same run, compare themselves with rank 0
    wait_until_ready() <────── ready/<rank> ───── ready(), or refuse(error)

It all goes through the store, before anything is written and before the process group is made.
"""

import base64
import hashlib
import logging
import time
from collections.abc import Mapping
from typing import Final

import msgspec
import torch

from offloop.engine.callback import Handlers
from offloop.engine.config import TrainerConfig
from offloop.engine.distributed.rank_log import SAYS_ITSELF
from offloop.engine.distributed.rendezvous import POLL, Store
from offloop.engine.errors import ConfigError, OffloopError, describe

logger = logging.getLogger("offloop")

PATIENCE: Final = 600.0
"""Seconds that a rank waits for the others to come, and to start the same run: they may read data for minutes."""
PIECE: Final = 2**20
"""Characters of a value in the store: torch's takes no more than 8 MiB."""
LONG: Final = 20.0
"""Seconds after which a waiting rank says so."""

Fingerprint = dict[str, str]
"""What must be alike on all ranks, by what it is called in the error."""


class Decision(msgspec.Struct, kw_only=True):
    """What rank 0 has decided about a run."""

    run_id: str
    directory: str | None
    """The run's; None for a run without one."""
    which: str | int | None
    """The checkpoint to continue from."""
    which_is_path: bool = False
    is_resumed: bool = False
    attempt: int = 0
    over: tuple[str, str] | None = None
    """Which callback has stopped the run that is resumed, and why."""
    fingerprint: Fingerprint
    deciders: list[str]
    """Names of the handlers that rank 0 asks for decisions."""
    error: str | None = None
    """Why rank 0 starts no run."""


def fingerprint(
    model: torch.nn.Module,
    optimizers: Mapping[str, torch.optim.Optimizer],
    config: TrainerConfig,
    handlers: list[Handlers],
    limits: object,
    loaders: Mapping[str, object],
) -> Fingerprint:
    """Return what must be alike on all ranks.

    Args:
        model: Names, shapes and types of its tensors count, not their values: rank 0's are sent.
        optimizers: Their classes and groups count.
        config: All knobs but the device.
        handlers: Those of all callbacks, whichever rank they run on.
        limits: Of the run.
        loaders: Their lengths count, by name; None where a loader has none.
    """
    settings = {name: value for name, value in config.as_settings().items() if name != "device"}
    return {
        "the call": "train",
        "model": described_model(model),
        "optimizers": ", ".join(
            f"{name}={type(each).__name__} with groups of {[len(group['params']) for group in each.param_groups]}"
            for name, each in optimizers.items()
        ),
        "callbacks": ", ".join(each.name for each in handlers),
        "run_name": str(config.run_name),
        "knobs": ", ".join(f"{name}={value!r}" for name, value in settings.items() if name != "run_name"),
        "limits": str(limits).removeprefix("Limits(").removesuffix(")"),
        **{name: f"{length} batches" for name, length in loaders.items()},
    }


def described_model(model: torch.nn.Module) -> str:
    """Return the class of a model and a digest of the names, shapes and types of its tensors."""
    named = (*model.named_parameters(), *model.named_buffers())
    shapes = "\n".join(f"{name} {tuple(each.shape)} {each.dtype}" for name, each in named)
    return f"{type(model).__name__} {hashlib.sha256(shapes.encode()).hexdigest()[:16]}"


class Plan:
    """The plan of one run, shared by all ranks. Methods block; any one thread at a time."""

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        """Plan a run.

        Args:
            store: A client whose keys belong to this run.
            rank: Of this process.
            world_size: Number of ranks.
        """
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._decision: Decision | None = None
        # Rank 0: the others know whether the run starts
        self._has_started = False

    def announce(self, decision: Decision) -> None:
        """Tell the others what was decided. Rank 0."""
        self._decision = decision
        self._store.set("plan", msgspec.json.encode(decision).decode())

    def learn(self) -> Decision:
        """Return what rank 0 has decided. Waits for it.

        Raises:
            ConfigError: Rank 0 starts no run, for the reason in the text.
            OffloopError: Rank 0 has started no run in time.
        """
        decision = msgspec.json.decode(self._wait("plan", "rank 0"), type=Decision)
        if decision.error is not None:
            raise ConfigError(f"rank 0 has started no run: {decision.error}")
        self._decision = decision
        return decision

    def share(self, key: str, value: bytes) -> None:
        """Give the others something large. Rank 0, before it announces.

        Args:
            key: Of its own in this plan.
            value: Of any length.
        """
        encoded = base64.b64encode(value).decode()
        pieces = [encoded[start : start + PIECE] for start in range(0, len(encoded), PIECE)]
        for number, piece in enumerate(pieces):
            self._store.set(f"{key}/{number}", piece)
        self._store.set(key, str(len(pieces)))

    def shared(self, key: str) -> bytes | None:
        """Return what rank 0 has shared; None if nothing. After `learn`."""
        if not self._store.check([key]):
            return None
        pieces = [self._store.get(f"{key}/{number}") for number in range(int(self._store.get(key)))]
        return base64.b64decode(b"".join(pieces))

    def refuse(self, error: BaseException) -> None:
        """Tell the others that this rank does not start the run, and why."""
        text = describe(error)
        if self._rank:
            self._store.set(f"ready/{self._rank}", text)
        elif self._decision is None:
            nothing = Decision(run_id="", directory=None, which=None, fingerprint={}, deciders=[], error=text)
            self._store.set("plan", msgspec.json.encode(nothing).decode())
        elif not self._has_started:
            # The others wait for the start
            self._store.set("start", f"rank 0 has started no run: {text}")

    def check(self, own: Fingerprint) -> None:
        """Compare this rank with rank 0.

        Raises:
            ConfigError: They differ; the text names what, and both values.
        """
        assert self._decision is not None
        for name, here in own.items():
            there = self._decision.fingerprint.get(name)
            if here != there:
                here, there = _difference(here, str(there))
                raise ConfigError(
                    f"all ranks must be started alike, but they differ in {name}: rank {self._rank} has {here}, "
                    f"rank 0 has {there}"
                )

    def ready(self) -> None:
        """Tell rank 0 that this rank is ready, or wait until all others are.

        Raises:
            ConfigError: Another rank cannot start the run, for the reason in the text.
            OffloopError: A rank has not come in time.
        """
        if self._rank:
            self._store.set(f"ready/{self._rank}", "")
            # Another one may refuse: then no rank starts
            text = self._wait("start", "all ranks")
            if text:
                raise ConfigError(text.decode())
            return
        refusals = []
        for rank in range(1, self._world_size):
            if text := self._wait(f"ready/{rank}", f"rank {rank}"):
                refusals.append(f"rank {rank} has started no run: {text.decode()}")
        self._has_started = True
        self._store.set("start", "; ".join(refusals))
        if refusals:
            raise ConfigError("; ".join(refusals))

    def _wait(self, key: str, what: str) -> bytes:
        """Wait for a key, with many looks: a signal handler must get its turn, and torch reports each long one."""
        started, is_reported = time.monotonic(), False
        while not self._store.check([key]):
            waited = time.monotonic() - started
            if waited > LONG and not is_reported:
                logger.warning(
                    "rank %d waits for %s: all ranks must make the same call",
                    self._rank,
                    what,
                    extra=SAYS_ITSELF,
                )
                is_reported = True
            if waited > PATIENCE:
                raise OffloopError(
                    f"{what} did not start this run within {PATIENCE:.0f} s, as all ranks must"
                )
            time.sleep(POLL)
        return bytes(self._store.get(key))


def _difference(here: str, there: str) -> tuple[str, str]:
    """Return the parts of two lists in words that differ."""
    ours, theirs = here.split(", "), there.split(", ")
    if len(ours) == len(theirs):
        pairs = [(own, other) for own, other in zip(ours, theirs, strict=True) if own != other]
        return ", ".join(own for own, _ in pairs), ", ".join(other for _, other in pairs)
    return here, there
