"""The quantization method of a cell: its class, its file and its parameters."""

import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from hydra.utils import get_object

from qvlm.config.schema import RunConfig
from qvlm.errors import RunError, UserError
from qvlm.methods.base import Method, MethodReport
from qvlm.packing import read_origin
from qvlm.quantization import Walk
from qvlm.validation import plain_parameters

STREAMABLE = "rtn, awq, layerwise, qvlm_cdm, qlora, zeroquant, smoothquant, gptq, quarot"


def method_class(node: Mapping[str, Any]) -> Any:
    """Imports what `method._target_` names.

    Raises:
        UserError: if it cannot be imported.
    """
    target = node["_target_"]
    if not target:
        raise UserError("method._target_ is empty. Give the import path of a class.")
    logger = logging.getLogger("hydra.utils")  # it prints the reason in several lines of its own
    logger.disabled = True
    try:
        return get_object(target)
    except Exception as error:  # a user's module may raise anything while it is imported
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(
            f"method._target_={target} is not importable ({reason}). Give the import path of a "
            "class, and its folder as --config-dir or in PYTHONPATH."
        ) from error
    finally:
        logger.disabled = False


def method_file(node: Mapping[str, Any]) -> Path:
    """The file that defines the class of a method."""
    return Path(inspect.getfile(method_class(node)))


def build_method(node: Mapping[str, Any]) -> Method:
    """Makes the method that `_target_` names, with the parameters beside it.

    The class may be any class of the user's. Its parameters are plain values, of which none is
    instantiated.

    Raises:
        UserError: if a parameter is unknown, missing or refused, or names a class itself.
    """
    target = method_class(node)
    if not inspect.isclass(target) or not callable(getattr(target, "quantize", None)):
        raise UserError(
            f"method._target_={node['_target_']} is not a method. A method is a class with a name "
            "and quantize(walk)."
        )
    plain_parameters("method", node)
    given = {key for key in node if key != "_target_"}
    parameters = inspect.signature(target).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        choices = ", ".join(p.name for p in parameters)
        for key in sorted(given - {p.name for p in parameters}):
            accepted = f"Choose one of: {choices}." if choices else "It has no parameters."
            raise UserError(f"method.{key} is not a parameter of {target.__name__}. {accepted}")
    try:
        method: Any = target(**{key: node[key] for key in given})
    except UserError:
        raise
    except Exception as error:  # a user's class may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"method: {target.__name__} does not accept its parameters: {reason}"
        ) from error
    if not isinstance(getattr(method, "name", None), str):
        raise UserError(
            f"method._target_={node['_target_']} is not a method. A method is a class with a name "
            "and quantize(walk)."
        )
    return cast(Method, method)


@dataclass
class Applied:
    """A method that quantized a model before it was packed.

    Attributes:
        name: Name of the method in tables, as the packed checkpoint states it.
    """

    name: str

    def quantize(self, walk: Walk) -> MethodReport:
        """Refuses, since the model is quantized."""
        raise RunError(f"{self.name} has quantized the model already.")


def method_of(config: RunConfig) -> Method:
    """Returns the method of a cell. That of a packed checkpoint is never built.

    Raises:
        UserError: if the method cannot be built, or the packed checkpoint cannot be read.
    """
    if config.model.packed is not None:
        return Applied(read_origin(config.model.packed).method)
    return build_method(config.method)


def not_streamable(method: str) -> UserError:
    """Makes the error for a method that needs more of the model than one layer at a time."""
    return UserError(
        f"stream=true is not possible with {method}, which needs more of the model than one layer "
        "at a time. Choose a method that takes block after block, or surveys the float model "
        f"first: {STREAMABLE}."
    )
