"""The two ways in which a run can end badly, each with its exit code.

Both carry one sentence for a person. The command line prints it to stderr without a traceback,
which `HYDRA_FULL_ERROR=1` brings back. A caller in Python catches the exceptions.
"""


class UserError(Exception):
    """The request is not possible. Names the option or file and what is accepted. Exit code 2."""


class RunError(Exception):
    """Something broke during a run. Names the layer, record or file. Exit code 1."""
