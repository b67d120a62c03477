"""One sentence for what Hydra or OmegaConf refuses."""

import shlex
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from qvlm.command import program
from qvlm.errors import UserError


@contextmanager
def explained(overrides: Sequence[str] = ()) -> Iterator[None]:
    """Turns what Hydra or OmegaConf refuses in the block into a `UserError`.

    Args:
        overrides: Overrides that the block hands to Hydra, for a refusal that names none.
    """
    try:
        yield
    except Exception as error:
        if not _is_refusal(error):
            raise
        raise UserError(explain(error, overrides)) from error


def explain(error: BaseException, overrides: Sequence[str] = ()) -> str:
    """Says in one sentence what Hydra or OmegaConf refused in `overrides`."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    message = str(error).strip()
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        if group and error.options is not None:
            choices = ", ".join(error.options)
            return f"{group}={option} is not a known option. Choose one of: {choices}."
    if isinstance(error, OverrideParseException):
        return _not_an_override(str(error.override))
    if message.startswith("Ambiguous value for argument"):
        override = message.splitlines()[0].split("'")[1]
        remedy = "Add -m to run all of them"
        if quoted := _quoted(override):
            remedy += f", or quote a value with a comma: {quoted}"
        return f"{override} is not a single value. {remedy}."
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        parent = cause.parent_node
        accepted = set(map(str, parent)) if isinstance(parent, DictConfig) else set()
        choices = ", ".join(sorted(accepted - {"hydra"}))
        key = cause.full_key or cause.key
        return (
            f"{key} is not a known key. Choose one of: {choices}."
            if choices
            else (f"{key} is not a known key.")
        )
    if isinstance(cause, OmegaConfBaseException):
        reason = str(cause.msg or cause).splitlines()[0]
        return f"{cause.full_key}: {reason}" if cause.full_key else reason
    return f"{' '.join(message.split()) or 'not accepted'}, in: {' '.join(overrides)}"


def _not_an_override(override: str) -> str:
    """Says how to write a word that Hydra's grammar refuses."""
    if "=" not in override:
        return (
            f"{override!r} is neither a command nor an override. Write overrides as key=value; "
            f"{program()} --help lists both."
        )
    remedy = "Write overrides as key=value"
    if quoted := _quoted(override):
        remedy = f"Quote its value: {quoted}"
    return f"{override!r} is not an override. {remedy}."


def _quoted(override: str) -> str:
    """An override for the shell, its value in quotes; "" if quotes would not make it one."""
    key, equals, value = override.partition("=")
    if not equals or not value.isprintable():
        return ""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    quoted = f'{key}="{escaped}"'
    try:
        OverridesParser.create().parse_override(quoted)
    except HydraException:
        return ""
    return shlex.quote(quoted)


def _is_refusal(error: Exception) -> bool:
    """Whether Hydra says that the input is wrong. Some of its refusals are errors of Python."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    origin = frames[-1].f_globals["__name__"].partition(".")[0]
    refusal = isinstance(error, HydraException | OmegaConfBaseException)
    plain = isinstance(error, ValueError | TypeError | AssertionError)
    return refusal or (plain and origin == "hydra")
