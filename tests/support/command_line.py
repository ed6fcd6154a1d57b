"""Runs `moegate` in this process, for the tests of the command line."""

from unittest.mock import patch

from typer.testing import CliRunner, Result

from moegate.cli import app
from moegate.measure import wall_clock


def run(*arguments: object, columns: int = 80) -> Result:
    """The output and the exit status of a command; an exception that the command did not catch is raised."""
    with patch.object(wall_clock, "_ENOUGH", 1000.0):  # microseconds; no test of the command line reads the time
        result = CliRunner(env={"COLUMNS": str(columns)}).invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception  # a user would see a traceback
    return result


def refused(*arguments: object) -> str:
    """The one line on stderr of a command that must exit with status 2 and print nothing else."""
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("moegate: ")
    return lines[0]
