"""Wrong usage of the `offloop` command: one line that says where help is."""

import command_line
import pytest


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("runs", "--nope"), "no such option: --nope; see offloop runs --help"),
        (("nope",), "no such command 'nope'; see offloop --help"),
        (("label",), "missing argument 'run'; see offloop label --help"),
        (("checkpoints", "nope"), "no such command 'nope'; see offloop checkpoints --help"),
        (("checkpoints", "tag", "x"), "missing argument 'name'; see offloop checkpoints tag --help"),
    ],
)
def test_wrong_usage_is_one_line(arguments: tuple[str, ...], text: str) -> None:
    result = command_line.offloop(*arguments)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"offloop: {text}\n")


def test_a_wrong_value_is_one_line_that_names_its_option() -> None:
    result = command_line.offloop("serve", "--port", "many")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("offloop: invalid value for '--port': ") and line.endswith(
        "; see offloop serve --help"
    )


def test_a_group_without_a_command_prints_its_help() -> None:
    result = command_line.offloop("checkpoints")
    assert result.exit_code == 2 and "Commands:" in result.output
