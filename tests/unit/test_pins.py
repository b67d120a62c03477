"""The pins agree with the project, carry hashes, and contradict no package that is installed."""

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "requirements"))

import pins  # noqa: E402

CONSTRAINTS, WHEELS, SOURCES = (
    dict(pins.blocks((ROOT / path).read_text()))
    for path in (pins.CONSTRAINTS, pins.WHEELS, pins.SOURCES)
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTORCH = {"torch", "triton"}


def test_every_package_of_the_project_is_pinned() -> None:
    extras = PROJECT["optional-dependencies"]
    hashed = WHEELS.keys() | SOURCES.keys()
    for text in [*PROJECT["dependencies"], *extras["dev"]]:
        name = canonicalize_name(Requirement(text).name)
        assert name in hashed | PYTORCH, name
    for text in [text for extra in extras.values() for text in extra]:
        assert canonicalize_name(Requirement(text).name) in CONSTRAINTS


def test_everything_but_pytorch_has_hashes_and_the_same_versions() -> None:
    hashed = WHEELS | SOURCES
    assert len(hashed) == len(WHEELS) + len(SOURCES) > 100
    assert PYTORCH.isdisjoint(hashed)
    versions = pins.pinned(ROOT / pins.CONSTRAINTS)
    for name, block in hashed.items():
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", block), name
        assert f"{name}=={versions[name]}" in block
    assert not any("--hash" in block for block in CONSTRAINTS.values())


def test_no_pin_refuses_a_build_of_pytorch_or_names_an_index() -> None:
    for path in (pins.CONSTRAINTS, pins.WHEELS, pins.SOURCES):
        text = (ROOT / path).read_text()
        assert not re.search(r"^(nvidia|cuda)-|://|^-", text, re.MULTILINE), path


def test_installed_packages_accept_each_others_pins() -> None:
    """What an installed package requires, PyTorch its Triton for example, admits what is pinned."""
    versions = pins.pinned(ROOT / pins.CONSTRAINTS)
    compared = 0
    for name, version in versions.items():
        try:
            installed = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if installed.version.partition("+")[0] != version:
            continue
        for text in installed.requires or []:
            needed = Requirement(text)
            pinned = versions.get(canonicalize_name(needed.name))
            if pinned and (needed.marker is None or needed.marker.evaluate({"extra": ""})):
                assert needed.specifier.contains(pinned, prereleases=True), (name, text, pinned)
                compared += 1
    assert compared > 100


def _package(name: str, *tags: str, marker: str | None = None) -> dict[str, object]:
    urls = [f"simple/{name}-1.0-{tag}.whl" for tag in tags]
    wheels = [{"url": url, "size": size} for size, url in enumerate(urls, 1)]
    package = {"name": name, "version": "1.0", "wheels": wheels, "sdist": {"size": 100}}
    return package if marker is None else package | {"marker": marker}


def test_a_machine_gets_the_best_wheel_that_it_takes() -> None:
    packages = [
        _package("pure", "py3-none-any"),
        _package("source"),
        _package("linux", "py3-none-any", marker="sys_platform == 'linux'"),
        _package(
            "compiled",
            "cp311-cp311-manylinux_2_17_x86_64",
            "cp311-cp311-manylinux_2_28_x86_64",
            "cp311-cp311-macosx_11_0_arm64",
            "cp311-cp311-macosx_14_0_arm64",
        ),
    ]

    def sizes(platform: str) -> dict[str, int]:
        return {p["name"]: p["size"] for p in pins.select(packages, "3.11", platform)}

    assert sizes("x86_64") == {"pure": 1, "source": 100, "linux": 1, "compiled": 2}
    assert sizes("macos") == {"pure": 1, "source": 100, "compiled": 4}
    for python, platform in (("3.11", "aarch64"), ("3.12", "x86_64")):
        with pytest.raises(pins.PinsError, match=f"compiled 1.0 has no wheel for Python {python}"):
            pins.select(packages, python, platform)


def test_what_this_machine_holds_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIP_FIND_LINKS", "PIP_CONSTRAINT", "PIP_EXTRA_INDEX_URL", "UV_FIND_LINKS"):
        monkeypatch.setenv(name, "/somewhere")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/etc/some.conf")
    monkeypatch.setenv("PIP_CERT", "/etc/ca.crt")
    environment = pins.clean_environment()
    held = {
        name for name, value in environment.items() if value in ("/somewhere", "/etc/some.conf")
    }
    assert not held
    assert environment["PIP_CERT"] == "/etc/ca.crt"


def test_supported_pythons_are_said_once_alike() -> None:
    minors = [int(python.removeprefix("3.")) for python in pins.PYTHONS]
    assert PROJECT["requires-python"] == f">=3.{minors[0]},<3.{minors[-1] + 1}"
    classified = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if " 3." in c]
    assert classified == list(pins.PYTHONS)
    assert ", ".join(pins.PYTHONS) in (ROOT / "Makefile").read_text()
