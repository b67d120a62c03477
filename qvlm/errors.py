"""The two ways in which a run can end badly, each with its exit code.

Both carry one sentence for a person. The command line prints it to stderr without a traceback,
which `HYDRA_FULL_ERROR=1` brings back. A caller in Python catches the exceptions.
"""


class UserError(Exception):
    """The request is not possible. Names the option or file and what is accepted. Exit code 2."""


class RunError(Exception):
    """Something broke during a run. Names the layer, record or file. Exit code 1."""


def first_line(error: Exception) -> str:
    """Returns the first line of an error's text, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
