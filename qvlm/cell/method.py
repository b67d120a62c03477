"""The quantization method of a cell: its class, its file and its parameters."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate

from qvlm.errors import UserError
from qvlm.methods.base import Method

STREAMABLE = "rtn, awq, layerwise, qlora, zeroquant"


def method_class(node: Mapping[str, Any]) -> Any:
    """Imports what `method._target_` names.

    Raises:
        UserError: if it cannot be imported.
    """
    target = node["_target_"]
    try:
        return get_object(target)
    except Exception as error:  # a user's module may raise anything while it is imported
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(
            f"method._target_={target} is not importable ({reason}). Give the import path of a "
            "class, and its folder as --config-dir or in PYTHONPATH."
        ) from error


def method_file(node: Mapping[str, Any]) -> Path:
    """The file that defines the class of a method."""
    return Path(inspect.getfile(method_class(node)))


def build_method(node: Mapping[str, Any]) -> Method:
    """Makes the method that `_target_` names, with the parameters beside it.

    Raises:
        UserError: if a parameter is unknown, missing or refused.
    """
    target = method_class(node)
    given = {key for key in node if key != "_target_"}
    parameters = inspect.signature(target).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        choices = ", ".join(p.name for p in parameters)
        for key in sorted(given - {p.name for p in parameters}):
            accepted = f"Choose one of: {choices}." if choices else "It has no parameters."
            raise UserError(f"method.{key} is not a parameter of {target.__name__}. {accepted}")
    try:
        method = instantiate(dict(node), _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from error
        reason = str(cause or error).splitlines()[0]
        raise UserError(
            f"method: {target.__name__} does not accept its parameters: {reason}"
        ) from error
    if not callable(getattr(method, "quantize", None)) or not hasattr(method, "name"):
        raise UserError(
            f"method._target_={node['_target_']} is not a method. A method has a name and "
            "quantize(walk)."
        )
    return method


def not_streamable(method: str) -> UserError:
    """Makes the error for a method that needs more of the model than one layer at a time."""
    return UserError(
        f"stream=true is not possible with {method}, which reads layers of the float model before "
        "it quantizes them. A stream reads each layer once. Choose a method that takes block after "
        f"block: {STREAMABLE}."
    )
