"""What all commands have in common: options are parsed, errors become one line and an exit code."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence

from qvlm.errors import RunError, UserError


def run_command(
    parser: ArgumentParser, work: Callable[[Namespace], None], arguments: Sequence[str] | None
) -> int:
    """Parses the options of a command and does its work.

    A `UserError` or `RunError` becomes one line on stderr. Any other exception keeps its traceback.

    Args:
        parser: Parser of the command's options.
        work: Function that does the work with the options.
        arguments: Words of the command line; None stands for those of this process.

    Returns:
        Exit code: 0 after success, 2 after a `UserError`, 1 after a `RunError`.
    """
    options = parser.parse_args(arguments)
    try:
        work(options)
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0
