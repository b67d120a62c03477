"""Locks the pinned packages, and checks that the pins install on every supported machine.

`make lock` writes three files from `pyproject.toml`, for all supported Pythons and platforms:

- `requirements/wheels.txt`: every package but PyTorch and Triton that has a wheel, with hashes;
- `requirements/sources.txt`: the few that publish their source only, with hashes;
- `constraints.txt`: every version, those of PyTorch, Triton and the optional extras included,
  without hashes. `make install` takes PyTorch's version from it, `pip install -c` an extra's.

The libraries on which a CUDA build of PyTorch depends are in none of them: each build requires its
own versions, and requires most of them exactly.

`make check-install` resolves the pins as on a new machine. It reads the metadata of wheels, so that
nothing large is downloaded, and ignores pip's configuration, local wheels and installed packages.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from packaging import tags
from packaging.markers import Marker
from packaging.utils import parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = Path("constraints.txt")
WHEELS = Path("requirements/wheels.txt")
SOURCES = Path("requirements/sources.txt")

PYTHONS = ("3.11", "3.12", "3.13", "3.14")
PLATFORMS = {"Linux x86-64": "x86_64", "Linux aarch64": "aarch64", "macOS arm64": "macos"}
# The oldest systems that the wheels of PyTorch run on.
MACOS = (14, 0)
GLIBC = (2, 28)

_CUDA_LIBRARY = re.compile(r"(nvidia|cuda)-")
_PYTORCH = ("torch", "triton")
_PIN = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s;\\]+)")
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")
_HEADER = "# Written by `make lock` from pyproject.toml; do not edit."

# A setting of pip or uv that says how to reach an index, not what a machine holds.
_CONNECTION = re.compile(
    r"(PIP|UV)_(INDEX_URL|DEFAULT_INDEX|CERT|CLIENT_CERT|PROXY|TRUSTED_HOST|NATIVE_TLS|"
    r"DEFAULT_TIMEOUT|HTTP_TIMEOUT|CACHE_DIR)$"
)


class PinsError(Exception):
    """A fault of the pins, in one sentence."""


def clean_environment() -> dict[str, str]:
    """The variables of this process without what pip and uv would take from this machine."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PIP_", "UV_")) or _CONNECTION.match(name)
    }
    return kept | {"PIP_CONFIG_FILE": os.devnull}


def _run(command: Sequence[str | Path], failure: str) -> str:
    """Runs a command in the project's folder and returns what it printed.

    Raises:
        PinsError: if it fails, with `failure` and the end of its output.
    """
    done = subprocess.run(
        command, cwd=ROOT, env=clean_environment(), text=True, capture_output=True, check=False
    )
    if done.returncode:
        raise PinsError(f"{failure}\n{(done.stdout + done.stderr).strip()[-3000:]}")
    return done.stdout + done.stderr


def _compile(output: Path, *options: str | Path) -> None:
    """Resolves pyproject.toml with uv; pins that stand in `output` already are kept if they fit."""
    uv = [sys.executable, "-m", "uv", "--no-config", "pip", "compile", "--quiet"]
    failure = "The packages of pyproject.toml cannot be resolved:"
    _run([*uv, "pyproject.toml", "--output-file", output, *options], failure)


def _resolution(folder: Path, *options: str | Path) -> list[dict[str, Any]]:
    """The packages of a resolution, as a lock file (PEP 751) describes them."""
    output = folder / "pylock.toml"
    output.unlink(missing_ok=True)
    _compile(output, "--format", "pylock.toml", *options)
    packages: list[dict[str, Any]] = tomllib.loads(output.read_text())["packages"]
    return packages


def blocks(text: str) -> list[tuple[str, str]]:
    """The pins of a requirements file: for each, the name and its lines, with hashes if any."""
    parts = re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE)
    return [(pin["name"], part) for part in parts if (pin := _PIN.match(part))]


def _write(path: Path, purpose: str, pins: Iterable[tuple[str, str]]) -> None:
    body = "".join(part.rstrip() + "\n" for _, part in pins)
    path.write_text(f"{_HEADER}\n# {purpose}\n{body}")


def lock(folder: Path, upgrade: bool, torch: str | None) -> list[dict[str, Any]]:
    """Writes the three files.

    Args:
        folder: Where the files are written; those there already say which versions to keep.
        upgrade: Whether every package but PyTorch is renewed.
        torch: Version of PyTorch to pin, or None to keep the one that is pinned. It is renewed only
            by name because every recorded result depends on it.

    Returns:
        The packages that `make install` installs on any machine, as PEP 751 describes them.
    """
    constraints, wheels, sources = folder / CONSTRAINTS, folder / WHEELS, folder / SOURCES
    everywhere = ("--universal", "--python-version", PYTHONS[0], "--fork-strategy", "fewest")
    plain = ("--no-header", "--no-annotate")
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        held = temporary / "held.txt"
        held.write_text(f"torch=={torch or pinned(constraints)['torch']}\n")
        versions = temporary / "versions.txt"
        shutil.copy(constraints, versions)
        renewed = ("--upgrade",) if upgrade else ()
        _compile(versions, "--all-extras", "-c", held, *renewed, *everywhere, *plain)

        hashed = temporary / "hashed.txt"
        before = [path.read_text() for path in (wheels, sources) if path.exists()]
        hashed.write_text("".join(before))  # a version that is kept keeps its hashes
        of_dev = ("--extra", "dev", "-c", versions, *everywhere)
        _compile(hashed, "--generate-hashes", *of_dev, *plain)
        packages = _resolution(temporary, *of_dev)
        without_wheel = {package["name"] for package in packages if not package.get("wheels")}

        ours = [pin for pin in blocks(versions.read_text()) if not _CUDA_LIBRARY.match(pin[0])]
        with_hash = [
            pin
            for pin in blocks(hashed.read_text())
            if pin[0] not in _PYTORCH and not _CUDA_LIBRARY.match(pin[0])
        ]
    wheels.parent.mkdir(parents=True, exist_ok=True)
    _write(constraints, "Every version that the project is measured with.", ours)
    installed = [pin for pin in with_hash if pin[0] not in without_wheel]
    _write(wheels, "What `make install` installs from wheels, but for PyTorch.", installed)
    built = [pin for pin in with_hash if pin[0] in without_wheel]
    _write(sources, "What `make install` builds, because no wheel is published.", built)
    return packages


def pinned(constraints: Path) -> dict[str, str]:
    """The version of each package in a file of pins; the first one where markers give several."""
    versions: dict[str, str] = {}
    for name, part in blocks(constraints.read_text()):
        pin = _PIN.match(part)
        assert pin is not None
        versions.setdefault(name, pin["version"])
    return versions


def check_fresh(temporary: Path) -> list[dict[str, Any]]:
    """Compares the files with what `make lock KEEP=1` would write.

    Returns:
        The packages that `make install` installs on any machine, as PEP 751 describes them.

    Raises:
        PinsError: if pyproject.toml names what is not pinned, or the pins were edited by hand.
    """
    for path in (CONSTRAINTS, WHEELS, SOURCES):
        (temporary / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, temporary / path)
    packages = lock(temporary, upgrade=False, torch=None)
    for path in (CONSTRAINTS, WHEELS, SOURCES):
        if (temporary / path).read_text() != (ROOT / path).read_text():
            raise PinsError(f"{path} does not agree with pyproject.toml. Run: make lock KEEP=1")
    return packages


def _accepted(python: str, platform: str) -> dict[tags.Tag, int]:
    """The tags of the wheels that install on a machine, each with its rank, the best first."""
    version = tuple(map(int, python.split(".")))
    if platform == "macos":
        platforms = list(tags.mac_platforms(MACOS, "arm64"))
    else:
        platforms = [f"manylinux_2_{minor}_{platform}" for minor in range(GLIBC[1], 4, -1)]
        older = ("manylinux2014", "manylinux2010", "manylinux1", "linux")
        platforms += [f"{name}_{platform}" for name in older]
    ordered = [
        *tags.cpython_tags(version, platforms=platforms),
        *tags.compatible_tags(version, f"cp{version[0]}{version[1]}", platforms),
    ]
    return {tag: rank for rank, tag in enumerate(ordered)}


def _environment(python: str, platform: str) -> dict[str, str]:
    """The values of environment markers on a machine."""
    macos = platform == "macos"
    return {
        "implementation_name": "cpython",
        "implementation_version": f"{python}.0",
        "os_name": "posix",
        "platform_machine": "arm64" if macos else platform,
        "platform_python_implementation": "CPython",
        "platform_system": "Darwin" if macos else "Linux",
        "python_full_version": f"{python}.0",
        "python_version": python,
        "sys_platform": "darwin" if macos else "linux",
    }


def select(packages: Iterable[dict[str, Any]], python: str, platform: str) -> list[dict[str, Any]]:
    """What a resolution for all machines installs on one of them.

    Args:
        packages: The packages of a lock file, as PEP 751 describes them.
        python: Version of Python, such as "3.11".
        platform: A value of `PLATFORMS`.

    Returns:
        A dictionary per package: its name, its version, and the size of its file in bytes.

    Raises:
        PinsError: if a package has wheels, and none of them is for this machine.
    """
    environment, accepted = _environment(python, platform), _accepted(python, platform)
    selected = []
    for package in packages:
        marker = package.get("marker")
        if marker is not None and not Marker(marker).evaluate(environment):
            continue
        ranked = [
            (min(accepted[tag] for tag in named & accepted.keys()), wheel["size"])
            for wheel in package.get("wheels", [])
            if (named := parse_wheel_filename(wheel["url"].rsplit("/", 1)[1])[3]) & accepted.keys()
        ]
        name, version = package["name"], package["version"]
        if package.get("wheels") and not ranked:
            raise PinsError(f"{name} {version} has no wheel for Python {python} on {platform}.")
        size = min(ranked)[1] if ranked else package["sdist"]["size"]
        selected.append({"name": name, "version": version, "size": size})
    return selected


def summary(selected: Sequence[dict[str, Any]]) -> str:
    """Versions of PyTorch and Triton, number of packages and GB to download, on one line."""
    versions = {package["name"]: package["version"] for package in selected}
    total = sum(package["size"] for package in selected) / 1e9
    return (
        f"torch {versions['torch']}  triton {versions.get('triton', 'none'):5}"
        f"  {len(selected)} packages  {total:.2f} GB"
    )


def check_pip(temporary: Path) -> str:
    """Resolves the pins with the newest pip and this Python, and installs nothing.

    Returns:
        pip's version.

    Raises:
        PinsError: if pip finds no resolution.
    """
    folder = temporary / "venv"
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    pip: list[str | Path] = [python, "-m", "pip", "--disable-pip-version-check"]
    _run([*pip, "install", "--upgrade", "pip"], "pip cannot be upgraded in a new environment:")
    resolution = [*pip, "install", "--dry-run", "--ignore-installed", "--use-feature=fast-deps"]
    _run([*resolution, "-c", CONSTRAINTS, ".[dev]"], "pip finds no resolution:")
    version = _run([*pip, "--version"], "pip does not answer:").split()[1]
    _check_hashes(temporary, pip)
    return version


def _check_hashes(temporary: Path, pip: Sequence[str | Path]) -> None:
    """Has pip download one package by its hash, and by a false one, which it must refuse."""
    options = ["--require-hashes", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    download = [*pip, "download", *options, "--dest", temporary / "downloads", "-r"]
    true, false = temporary / "true.txt", temporary / "false.txt"
    block = dict(blocks((ROOT / WHEELS).read_text()))["packaging"]
    true.write_text(block)
    false.write_text(_HASH.sub(lambda found: f"--hash=sha256:{found[1][::-1]}", block))
    _run([*download, true], "pip refuses a package whose hash is right:")
    try:
        _run([*download, false], "")
    except PinsError as refused:
        if "DO NOT MATCH" not in str(refused):
            raise
    else:
        raise PinsError("pip accepts a package whose hash is altered.")


def check() -> None:
    """Does all checks and prints a line for each.

    Raises:
        PinsError: at the first that fails.
    """
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        packages = check_fresh(temporary)
        print("pins agree with pyproject.toml", flush=True)
        for title, platform in PLATFORMS.items():
            for python in PYTHONS:
                print(f"{title:13}  Python {python}  {summary(select(packages, python, platform))}")
        version = check_pip(temporary)
        print(f"pip {version} resolves the same pins here, and refuses an altered hash")


def main() -> int:
    """Runs one of the two commands; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    locking = commands.add_parser("lock", help="writes the pins")
    locking.add_argument("--keep", action="store_true", help="keeps all versions that still fit")
    locking.add_argument("--torch", metavar="VERSION", help="pins another version of PyTorch")
    commands.add_parser("check", help="resolves the pins as on a new machine")
    options = parser.parse_args()
    try:
        if options.command == "lock":
            lock(ROOT, not options.keep, options.torch)
        else:
            check()
    except PinsError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
