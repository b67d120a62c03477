"""A user's method may be any class, and nothing inside its parameters is instantiated."""

import pickle
from pathlib import Path
from typing import Any

import pytest

from qvlm.cell.method import build_method
from qvlm.errors import UserError
from qvlm.sweep.launch import build

MADE: list[Any] = []


class Open:
    """Takes any parameters."""

    name = "Open"

    def __init__(self, **parameters: Any) -> None:
        MADE.append(parameters)

    def quantize(self, walk: Any) -> None:
        raise NotImplementedError


class Nameless(Open):
    name = None  # type: ignore[assignment]


class Refusing(Open):
    def __init__(self, error: str = "") -> None:
        raise ZeroDivisionError(error)


def factory(**parameters: Any) -> Open:
    return Open(**parameters)


TARGET = f"{__name__}.Open"


class Payload:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return open, (str(self.marker), "w")


def test_parameters_reach_the_class_as_they_are() -> None:
    given = {"a": [1, {"b": None}], "c": "text", "__d": 1, "_": 2}
    build_method({"_target_": TARGET, **given})
    assert MADE[-1] == given


@pytest.mark.parametrize("kind", ["direct", "list", "mapping", "deep"])
def test_nothing_nested_is_instantiated(kind: str, tmp_path: Path) -> None:
    marker, pickled = tmp_path / "executed", tmp_path / "payload.pkl"
    pickled.write_bytes(pickle.dumps(Payload(marker)))
    node: Any = {"_target_": "pandas.read_pickle", "filepath_or_buffer": str(pickled)}
    nested = {"direct": node, "list": [node], "mapping": {"b": node}, "deep": [{"b": [[node]]}]}
    count = len(MADE)
    with pytest.raises(UserError, match=r"^method\.a.*_target_ is not a parameter\."):
        build_method({"_target_": TARGET, "a": nested[kind]})
    with pytest.raises(UserError, match=r"^launcher\.sbatch.*_target_ is not a parameter\."):
        build({"_target_": "qvlm.sweep.slurm.Slurm", "sbatch": {"a": nested[kind]}})
    assert not marker.exists()
    assert len(MADE) == count


@pytest.mark.parametrize("key", ["_partial_", "_args_", "_recursive_", "_convert_"])
def test_what_hydra_would_interpret_is_not_a_parameter(key: str) -> None:
    with pytest.raises(UserError, match=rf"^method\.{key} is not a parameter"):
        build_method({"_target_": TARGET, key: True})


@pytest.mark.parametrize(
    "target", ["os.getcwd", "pathlib.Path", f"{__name__}.factory", f"{__name__}.Nameless"]
)
def test_what_is_not_a_method_is_refused(target: str) -> None:
    with pytest.raises(UserError, match="is not a method. A method is a class with a name and"):
        build_method({"_target_": target})


def test_what_a_class_raises_is_one_sentence() -> None:
    with pytest.raises(UserError, match="Refusing does not accept its parameters: ZeroDivision"):
        build_method({"_target_": f"{__name__}.Refusing"})
    with pytest.raises(UserError, match="parameters: two$"):
        build_method({"_target_": f"{__name__}.Refusing", "error": "two\nlines"})
