"""Commands say the errors of users in one line, and their exit code says whose error it is."""

from argparse import ArgumentParser, Namespace

import pytest

from qvlm.command import run_command
from qvlm.errors import RunError, UserError


def parser() -> ArgumentParser:
    made = ArgumentParser()
    made.add_argument("--number", type=int, default=1)
    return made


def test_the_work_gets_the_options() -> None:
    given: list[Namespace] = []
    assert run_command(parser(), given.append, ["--number", "3"]) == 0
    assert [options.number for options in given] == [3]


@pytest.mark.parametrize(("error", "code"), [(UserError, 2), (RunError, 1)])
def test_an_error_is_one_line_and_an_exit_code(
    error: type[Exception], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(options: Namespace) -> None:
        raise error(f"{options.number} is not accepted.")

    assert run_command(parser(), work, []) == code
    assert capsys.readouterr() == ("", "error: 1 is not accepted.\n")


def test_an_unexpected_exception_keeps_its_traceback() -> None:
    def work(options: Namespace) -> None:
        raise ZeroDivisionError(options.number)

    with pytest.raises(ZeroDivisionError):
        run_command(parser(), work, [])
