"""engine/bus/commands.py: typed commands, the table of their rules, and the order in which any mix of them applies."""

import contextvars
import functools
import itertools
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offloop.engine import (
    Call,
    Callback,
    Command,
    CommandApplied,
    ConfigError,
    EpochEnd,
    Metrics,
    Pause,
    Resume,
    Run,
    RunEndedError,
    SaveCheckpoint,
    SetLearningRate,
    Stop,
    TagCheckpoint,
    Validate,
    decides,
)
from offloop.engine.bus.command_mailbox import Mailbox, deciding
from offloop.engine.bus.commands import RULES, Need, Place, check, refused_for
from offloop.engine.testing import Recorder, tiny_loader, tiny_trainer


@pytest.mark.parametrize("command", [Pause, Stop, SaveCheckpoint])
def test_a_reason_that_is_no_text_is_refused(command: Any) -> None:
    with pytest.raises(TypeError, match=r"reason must be a string, got ValueError\('why'\)"):
        command(ValueError("why"))


def step_of(trainer: Any) -> int:
    return int(trainer.step)


COMMANDS: Final[tuple[Command[Any], ...]] = (
    Pause("a look"),
    Resume(),
    Stop("enough"),
    SetLearningRate(0.25),
    Validate(),
    SaveCheckpoint(),
    SaveCheckpoint("best"),
    SaveCheckpoint("interval"),
    TagCheckpoint("good"),
    Call(step_of),
)
NAMES: Final = {"pause", "resume", "stop", "set_lr", "validate", "checkpoint", "tag", "call"}

commands = st.sampled_from(COMMANDS)


# What a command is -------------------------------------------------------------------------------


def test_every_command_has_a_row_in_the_table_and_a_method_of_the_run() -> None:
    assert {type(command) for command in COMMANDS} == RULES.keys()
    assert {command.name for command in COMMANDS} == NAMES
    for name in NAMES:
        assert callable(getattr(Run, name)) and callable(getattr(Run, f"{name}_nowait"))


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (Pause(), {"reason": ""}),
        (Resume(), {}),
        (Stop(), {"reason": "asked to stop"}),
        (SetLearningRate(1, group=2), {"lr": 1.0, "group": 2, "optimizer": None}),
        (Validate(), {}),
        (SaveCheckpoint(), {"reason": "command"}),
        (TagCheckpoint("good", move=True), {"tag": "good", "move": True, "checkpoint": None}),
        (TagCheckpoint("good", checkpoint=7), {"tag": "good", "move": False, "checkpoint": 7}),
        (Call(step_of), {"function": "step_of"}),
        (
            Call(functools.partial(print, "x")),
            {"function": "functools.partial(<built-in function print>, 'x')"},
        ),
        (Stop("caf\udce9"), {"reason": "caf\\udce9"}),  # from the name of an odd file
    ],
)
def test_events_show_the_arguments_of_a_command(command: Command[Any], arguments: dict[str, Any]) -> None:
    assert command.arguments() == arguments


def test_a_command_of_plain_values_travels_as_json() -> None:
    decoder = msgspec.json.Decoder(Stop | SetLearningRate | TagCheckpoint)
    assert decoder.decode(b'{"command": "set_lr", "lr": 0.5}') == SetLearningRate(0.5)
    assert msgspec.json.encode(Stop("enough")) == b'{"command":"stop","reason":"enough"}'
    with pytest.raises(msgspec.ValidationError, match="lr must be a finite number above 0"):
        decoder.decode(b'{"command": "set_lr", "lr": 0.0}')


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: SetLearningRate(0.0), ConfigError, "lr must be a finite number above 0, got 0.0"),
        (lambda: SetLearningRate(float("nan")), ConfigError, "lr must be a finite number above 0, got nan"),
        (lambda: TagCheckpoint("last"), ConfigError, "tag must be letters"),
        (lambda: Call(3), TypeError, "call takes a function of the trainer, got 3"),  # type: ignore[arg-type]
    ],
)
def test_a_command_that_is_never_legal_cannot_be_made(
    make: Callable[[], object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        make()


# Why one is rejected -----------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("lacking", [set(), {Need.VAL_LOADER}, {Need.DIRECTORY}, set(Need)])
def test_what_is_rejected_is_what_is_listed_as_refused(command: Command[Any], lacking: set[Need]) -> None:
    refused = refused_for(lacking)
    why = refused.get(command.name)
    assert why == (None if command.rule.needs not in lacking else command.rule.needs.value)
    if why is None:
        check(command, refused=refused, groups={"optimizer": 1})
        return
    with pytest.raises(ConfigError) as caught:
        check(command, refused=refused, groups={"optimizer": 1})
    assert str(caught.value) == why


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (SetLearningRate(0.5), "which optimizer? Give optimizer=, one of first, second"),
        (SetLearningRate(0.5, optimizer="third"), "there is no optimizer 'third'; there are first, second"),
        (SetLearningRate(0.5, 2, "second"), "group must be from 0 to 1, got 2"),
        (SetLearningRate(0.5, -1, "second"), "group must be from 0 to 1, got -1"),
    ],
)
def test_a_learning_rate_is_for_an_optimizer_and_a_group_that_exist(command: Command[Any], text: str) -> None:
    groups = {"first": 1, "second": 2}
    with pytest.raises(ConfigError) as caught:
        check(command, refused={}, groups=groups)
    assert str(caught.value) == text
    check(SetLearningRate(0.5, 1, "second"), refused={}, groups=groups)


# In the mailbox ----------------------------------------------------------------------------------

Given = tuple[int, Command[Any], bool]
"""A command that waits: its number, the command, and whether a decider gave it."""

ACTIONS: Final = st.one_of(
    st.tuples(st.just("give"), commands, st.booleans()),
    st.tuples(st.just("take back"), st.integers(0, 20), st.just(False)),
    st.tuples(
        st.just("collect"), st.sampled_from([Place.BATCH, Place.VALIDATION, Place.STEP]), st.booleans()
    ),
)


def applies(command: Command[Any], from_decider: bool, place: Place, deciders_only: bool) -> bool:
    if isinstance(command, Pause | Resume):
        return True
    if isinstance(command, Stop):
        return place is not Place.BATCH
    return place is Place.STEP and (from_decider or not deciders_only)


def is_by_policy(given: Given) -> bool:
    return given[1] in (SaveCheckpoint("best"), SaveCheckpoint("interval"))


def merged(expected: list[Given], futures: list[Future[Any]]) -> list[tuple[list[int], Command[Any]]]:
    """Return what is applied, and the numbers of the commands that it serves."""
    applied: list[tuple[list[int], Command[Any]]] = []
    for by_policy, group in itertools.groupby(expected, is_by_policy):
        wanted = [each for each in group if not futures[each[0]].cancelled()]
        if by_policy and wanted:
            command = max((each[1] for each in wanted), key=lambda each: each == SaveCheckpoint("best"))
            applied.append(([each[0] for each in wanted], command))
        elif not by_policy:
            applied += [([number], command) for number, command, _ in wanted]
    return applied


@settings(max_examples=300)
@given(actions=st.lists(ACTIONS, max_size=40))
def test_any_mix_of_commands_applies_in_order_and_completes_every_future_once(
    actions: list[tuple[str, Any, bool]],
) -> None:
    """The training thread collects at any place; givers take commands back; then the run ends."""
    mailbox, futures, waiting = Mailbox(), list[Future[Any]](), list[Given]()
    completed: list[int] = []  # a number for every call of a future's callback

    def give(command: Command[Any], from_decider: bool) -> None:
        number, context = len(futures), contextvars.copy_context()
        if from_decider:
            context.run(deciding.set, mailbox)
        future: Future[Any] = context.run(mailbox.give, command, str(number))
        future.add_done_callback(lambda _: completed.append(number))
        futures.append(future)
        waiting.append((number, command, from_decider))

    def collect(place: Place, deciders_only: bool) -> None:
        expected = [each for each in waiting if applies(each[1], each[2], place, deciders_only)]
        waiting[:] = [each for each in waiting if each not in expected]
        expected.sort(key=lambda each: (isinstance(each[1], Stop), not each[2]))
        applied: list[tuple[list[int], Command[Any]]] = []
        for envelope in mailbox.collect(place, deciders_only=deciders_only):
            if envelope.future.set_running_or_notify_cancel():
                envelope.future.set_result(len(applied))
                applied.append(([int(giver) for giver in envelope.givers], envelope.command))
        assert applied == merged(expected, futures)
        for index, (numbers, _) in enumerate(applied):
            assert [futures[number].result(0) for number in numbers] == [index] * len(numbers)
        assert mailbox.attention is bool(waiting)

    for action, what, flag in actions:
        match action:
            case "give":
                give(what, flag)
            case "take back" if what < len(futures):
                futures[what].cancel()
            case "collect":
                collect(what, flag)
    mailbox.end()
    assert sorted(completed) == list(range(len(futures)))
    for number, *_ in waiting:
        if not futures[number].cancelled():
            assert isinstance(futures[number].exception(0), RunEndedError)


def test_a_checkpoint_that_is_taken_back_does_not_take_another_one_with_it() -> None:
    """Both would have been one checkpoint."""
    mailbox = Mailbox()
    taken_back, wanted = mailbox.give(SaveCheckpoint("best")), mailbox.give(SaveCheckpoint("interval"))
    taken_back.cancel()
    (envelope,) = mailbox.collect(Place.STEP)
    assert envelope.command == SaveCheckpoint("interval")
    assert envelope.future.set_running_or_notify_cancel() and not wanted.cancel()
    envelope.future.set_exception(ValueError("no room"))
    with pytest.raises(ValueError, match="no room"):
        wanted.result(0)


# In a run ----------------------------------------------------------------------------------------


class Mixer(Callback):
    """Gives commands at the end of each epoch: as a decider, or as from elsewhere."""

    def __init__(self, script: list[list[tuple[Command[Any], bool]]]) -> None:
        """Take the commands of each epoch, and whether a decider gives them."""
        self.script = script
        self.futures: dict[int, Future[Any]] = {}
        self.expected: list[Given] = []
        self.rejected: list[tuple[str, str]] = []

    @decides
    def on_epoch_end(self, event: EpochEnd, run: Run) -> None:
        accepted: list[Given] = []
        # The last command ends any pause
        for command, from_decider in [*self.script[event.epoch], (Resume(), False)]:
            context = contextvars.copy_context() if from_decider else contextvars.Context()
            try:
                future = context.run(run.give_nowait, command)
            except ConfigError as error:
                self.rejected.append((command.name, str(error)))
            else:
                accepted.append((len(self.futures), command, from_decider))
                self.futures[len(self.futures)] = future
        accepted.sort(key=lambda each: (isinstance(each[1], Stop), not each[2]))
        # Once the run is stopping, only deciders' commands apply
        stop = next(
            (index for index, each in enumerate(accepted) if isinstance(each[1], Stop)), len(accepted)
        )
        self.expected += [each for index, each in enumerate(accepted) if index <= stop or each[2]]


@settings(max_examples=15)
@given(
    script=st.lists(st.lists(st.tuples(commands, st.booleans()), max_size=8), min_size=1, max_size=3),
    validates=st.booleans(),
)
def test_a_run_applies_any_mix_of_commands_in_order_and_rejects_what_the_table_says(
    script: list[list[tuple[Command[Any], bool]]], validates: bool
) -> None:
    mixer, recorder = Mixer(script), Recorder()
    loader = tiny_loader(1) if validates else None
    result = tiny_trainer(val_every_n_epochs=100).train(
        tiny_loader(1), loader, epochs=len(script), callbacks=[mixer, recorder]
    )
    applied = recorder.of(CommandApplied)
    assert [(event.command_id, event.command) for event in applied] == [
        (number, command.name) for number, command, _ in mixer.expected
    ]
    assert [event.error for event in applied] == [None] * len(applied)
    why = refused_for({Need.DIRECTORY} if validates else set(Need))
    assert mixer.rejected == [
        (command.name, why[command.name])
        for commands in script[: len(recorder.of(EpochEnd))]
        for command, _ in commands
        if command.name in why
    ]
    for number, command, _ in mixer.expected:
        kind = {"validate": Metrics, "call": int}.get(command.name, type(None))
        assert isinstance(mixer.futures.pop(number).result(0), kind)
    assert all(isinstance(future.exception(0), RunEndedError) for future in mixer.futures.values())
    is_stopped = any(isinstance(command, Stop) for _, command, _ in mixer.expected)
    assert result.status == ("stopped" if is_stopped else "completed")
