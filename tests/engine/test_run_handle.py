"""engine/run_handle.py: a run's handle is the same thing in every place where a callback may run."""

import pytest

from offloop.engine import Run, RunHandle
from offloop.engine.run_handle import NOT_EVERYWHERE, no_attribute
from offloop.engine.testing import Recorder, tiny_loader, tiny_trainer


def public(cls: type) -> set[str]:
    return {name for name in dir(cls) if not name.startswith("_")}


def test_what_only_a_run_has_is_listed_with_the_reason() -> None:
    assert list(NOT_EVERYWHERE) == sorted(public(Run) - public(RunHandle))
    assert issubclass(Run, RunHandle)


@pytest.mark.anyio
async def test_an_attribute_that_a_handle_elsewhere_does_not_have_is_explained() -> None:
    async with tiny_trainer().start(tiny_loader(1), epochs=1, callbacks=[Recorder()]) as run:
        texts = [str(no_attribute(run, name)) for name in ("trainer", "should_stop", "stopp")]
    assert texts == [
        "there is no run.trainer here: the model is in the process that trains; use it in a callback that runs there",
        'a run is not stopped by an attribute: call run.stop_nowait("why"), or await run.stop("why")',
        "'Run' object has no attribute 'stopp'",
    ]
