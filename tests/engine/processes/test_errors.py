"""engine/processes/errors.py: exceptions on their way from a child process."""

import threading

from placed_callbacks import OwnError, UnpicklableError

from offloop.engine.processes.errors import pack_error, unpack_error


class UnreadableError(Exception):
    """Holds an argument that has no text."""

    class Mute:
        def __repr__(self) -> str:
            raise RuntimeError("no text")

        def __reduce__(self) -> str:
            raise RuntimeError("no pickle")

    def __init__(self) -> None:
        super().__init__(1, self.Mute())


def test_an_exception_arrives_as_its_own_class_with_what_can_go() -> None:
    error = unpack_error(pack_error(UnpicklableError("boo", 3)))
    assert type(error) is UnpicklableError
    assert error.code == 3 and not hasattr(error, "lock")
    text, lock = error.args
    assert text == "boo!" and lock.startswith("<unlocked _thread.lock")
    assert "Mute object at" in unpack_error(pack_error(UnreadableError())).args[1]


def test_notes_hold_where_it_comes_from_and_are_not_repeated() -> None:
    own = OwnError("boo", 3)
    own.add_note("look here")
    error = unpack_error(pack_error(own), "in the process of Mine")
    (note,) = error.__notes__
    assert note.startswith("in the process of Mine:\n") and "look here" in note


def test_an_exception_whose_class_is_of_a_function_arrives_as_its_text() -> None:
    class LocalError(Exception):
        pass

    error = unpack_error(pack_error(LocalError("boo", threading.Lock())))
    assert type(error) is RuntimeError
    assert str(error).startswith("LocalError: ('boo', <unlocked _thread.lock")
