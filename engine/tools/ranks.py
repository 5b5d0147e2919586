"""What tools do where several processes ("ranks") were started: together, or not at all."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from offloop.engine.config import TrainerConfig
from offloop.engine.data.batches import length_of
from offloop.engine.data.val_loaders import by_prefix
from offloop.engine.errors import ConfigError
from offloop.engine.session.ranks import launched, may_have_ranks
from offloop.engine.training.program import TrainingProgram
from offloop.engine.training.setup import Setup

if TYPE_CHECKING:
    from offloop.engine.distributed.together import Together


def expect_one_process(config: TrainerConfig, what: str) -> None:
    """Check that this process was started alone.

    Raises:
        ConfigError: It was not.
    """
    _, world_size = launched(config)
    if world_size > 1:
        raise ConfigError(
            f"{what} wants one process, and {world_size} were started together: run it in a script of its own without "
            'torchrun, or with Trainer(strategy="none"), where each process searches alone'
        )


@contextlib.contextmanager
def with_other_ranks(
    program: TrainingProgram, what: str, prepare: Callable[[], Setup]
) -> "Iterator[tuple[Setup, Together | None]]":
    """Do something with all ranks in the block, see `together`; alone in a process that was started alone.

    Args:
        program: The trainer.
        what: The method that all ranks call.
        prepare: Checks the arguments, and returns a setup with the loader as `val_loader`.

    Returns:
        A context that gives the setup, and what the ranks do together, or None.
    """
    if not may_have_ranks(program.config):
        yield prepare(), None
        return
    from offloop.engine.distributed.together import together
    from offloop.engine.metrics.merging import check_mergeable

    def prepare_alike() -> tuple[Setup, dict[str, str]]:
        setup = prepare()
        for metrics in setup.val_metrics.values():
            check_mergeable(metrics)
        alike = {
            f"length of loader {prefix}": str(length_of(loader))
            for prefix, loader in by_prefix(setup.val_loader).items()
        }
        alike["metrics"] = (
            ", ".join(next(iter(setup.val_metrics.values())).names) if setup.val_metrics else ""
        )
        return setup, alike

    with together(program, what, prepare_alike) as found:
        yield found
