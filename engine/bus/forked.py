"""Processes that are forked inside a run: they end by themselves and leave the run alone.

`os.fork` in a step copies one thread, the training thread. The copy has no event loop, no writer and no
observers, but it has the run's files, its sockets and its callbacks. Code of the copy that raises or exits
must end the process as it would in a script; it must not close the run that goes on in the parent.

    generation          counts the forks between this process and the first one; whoever hosts a user's code
                        compares it before and after
    end_process         ends the copy, with its exit code and its traceback
"""

import contextlib
import os
import sys
import weakref
from typing import TYPE_CHECKING, Final, NoReturn

if TYPE_CHECKING:
    from offloop.engine.bus.command_mailbox import Mailbox

generation = 0
"""Grows by one in each forked child. Read by every thread that runs a user's code."""

RETURNED: Final = (
    "a process that was forked inside a run has returned into the run, which goes on in its parent only: "
    "end it with os._exit() or sys.exit(), or use multiprocessing"
)

# Mailboxes of the runs of this process. In a child their training threads are made to look up.
_mailboxes: "weakref.WeakSet[Mailbox]" = weakref.WeakSet()


class ForkedProcessError(BaseException):
    """Raised in a forked child that has returned into the training loop. It never reaches a caller."""


def watch(mailbox: "Mailbox") -> None:
    """Have a run's training thread leave in a child that is forked from it. Any thread."""
    _mailboxes.add(mailbox)


def end_process(error: BaseException | None) -> NoReturn:
    """End this forked process: by what its code raised, or for having returned into the run.

    Exit handlers are not run, as in the children of multiprocessing: they are the parent's.
    """
    code = 1
    with contextlib.suppress(BaseException):
        if isinstance(error, SystemExit):
            if error.code is None or isinstance(error.code, int):
                code = error.code or 0
            else:
                print(error.code, file=sys.stderr)
        elif error is None or isinstance(error, ForkedProcessError):
            print(f"offloop: {RETURNED}", file=sys.stderr)
        else:
            sys.excepthook(type(error), error, error.__traceback__)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):
            stream.flush()
    os._exit(code & 0xFF)


def _note_fork() -> None:
    global generation
    generation += 1
    # Attributes only: a lock may be held by a thread that this process does not have.
    for mailbox in list(_mailboxes):
        mailbox.is_forked = True
        mailbox.attention = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)
