"""The `offloop` command, called in this process."""

from typer.testing import CliRunner, Result

from offloop.cli.main import app


def offloop(*arguments: str, columns: int = 80) -> Result:
    """Call the command on a terminal of some columns that knows no colours."""
    result = CliRunner(env={"COLUMNS": str(columns), "TERM": "dumb"}).invoke(app, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result
