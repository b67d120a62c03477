"""The two ways a run can end badly, and the exit code of each.

Both carry one sentence for a person. The command line prints that sentence to stderr without a
traceback (`HYDRA_FULL_ERROR=1` brings the traceback back); a caller in Python catches them.
"""


class UserError(Exception):
    """What was asked for cannot be: names the option or file and what is accepted. Exit code 2."""


class RunError(Exception):
    """A run broke while it was running: names the layer, record or file. Exit code 1."""
