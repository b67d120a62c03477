"""What is recorded beside a number: time, package versions, git revision and hardware.

None of it identifies a record. `qvlm.records.provenance` hashes what does.
"""

import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]  # of the checkout, conf and experiments included

PACKAGES = ("torch", "transformers", "datasets", "lm_eval", "hydra-core", "numpy", "pandas")


def surroundings() -> dict[str, Any]:
    """What is recorded beside a number without naming it: time, packages, revision, hardware."""
    return {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "git": revision(),
        "hardware": hardware(),
    }


def versions() -> dict[str, str]:
    """Python and the packages that numbers depend on."""
    return {"python": platform.python_version()} | {
        package: metadata.version(package) for package in PACKAGES
    }


def revision_in_words(git: Mapping[str, Any]) -> str:
    """The commit of what `revision` returned, as pages print it."""
    return f"{git['revision'] or 'unknown'}" + (", with local changes" if git["dirty"] else "")


def revision() -> dict[str, Any]:
    """The git revision of this checkout and whether its tracked files were changed since.

    What a run generates does not count: the second table of a fresh clone is as clean as the first.
    """
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
    return {"revision": commit, "dirty": bool(changed) if commit else None}


def command_line() -> str:
    """Returns the command of this process, for a shell, without the folder of its program."""
    program = Path(sys.argv[0])
    started = ["-m", program.parent.name] if program.name == "__main__.py" else [program.name]
    return shlex.join(["python", *started, *sys.argv[1:]])


def hardware() -> dict[str, Any]:
    """Processor, memory and GPU; no name that identifies the machine."""
    import torch

    return {
        "system": platform.system(),
        "cpu": _processor(),
        "cores": psutil.cpu_count(logical=True),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
