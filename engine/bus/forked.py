"""Processes that are forked inside a run: they end without touching the run.

`os.fork` in a step copies one thread, the training thread. The child has no event loop, no writer and no
observers, but it has the run's files, sockets and callbacks. When the child's code raises or exits, the
process must end as it would in a script; it must not close the run that continues in the parent.

    generation          the number of forks between this process and the first one; code that calls user code
                        compares it before and after
    end_process         ends the child, with its exit code and its traceback
"""

import contextlib
import os
import sys
import weakref
from typing import TYPE_CHECKING, Final, NoReturn

if TYPE_CHECKING:
    from offloop.engine.bus.command_mailbox import Mailbox

generation = 0
"""One more in a forked child than in its parent. Read by the threads that run user code."""

RETURNED: Final = (
    "a process that was forked inside a run has returned into the run, which continues in the parent only: "
    "end it with os._exit() or sys.exit(), or use multiprocessing"
)

# Mailboxes of the runs of this process. In a child they make the training thread leave.
_mailboxes: "weakref.WeakSet[Mailbox]" = weakref.WeakSet()


class ForkedProcessError(BaseException):
    """Raised in a forked child that has returned into the training loop. It never reaches a caller."""


def watch(mailbox: "Mailbox") -> None:
    """Make a run's training thread leave in every child that is forked from it. Any thread."""
    _mailboxes.add(mailbox)


def end_process(error: BaseException | None) -> NoReturn:
    """End this forked process: with the error that its code raised, or because it returned into the run.

    Exit handlers belong to the parent and do not run, as in the children of multiprocessing.
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
    # Takes no lock: a thread that does not exist in this process may hold it.
    for mailbox in list(_mailboxes):
        mailbox.is_forked = True
        mailbox.attention = True


os.register_at_fork(after_in_child=_note_fork)
