"""The settings that cells are computed under, and the comparison of what came out."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from qvlm.errors import RunError
from qvlm.tables.portable.worker import Job, Outcome


@dataclass(frozen=True)
class Setting:
    """What differs between processes.

    Attributes:
        name: Name in messages and tables.
        environment: Environment variables that restrict what PyTorch and its libraries use.
        threads: Number of threads.
    """

    name: str
    environment: Mapping[str, str] = field(default_factory=dict)
    threads: int = 1


# The first one is what the others are compared with.
SETTINGS = (
    Setting("this machine, 1 thread"),
    Setting("2 threads", threads=2),
    Setting("AVX2", {"ATEN_CPU_CAPABILITY": "avx2", "QVLM_WITHOUT": "native"}),
    Setting("no vector instructions", {"ATEN_CPU_CAPABILITY": "default"}),
    Setting("MKL's compatible products", {"MKL_CBWR": "COMPATIBLE"}),
    Setting("oneDNN with SSE4.1", {"ONEDNN_MAX_CPU_ISA": "SSE41"}),
    Setting(
        "all of these",
        {
            "ATEN_CPU_CAPABILITY": "default",
            "MKL_CBWR": "COMPATIBLE",
            "ONEDNN_MAX_CPU_ISA": "SSE41",
            "QVLM_WITHOUT": "native",
        },
        threads=2,
    ),
)


def outcomes(
    setting: Setting, cells: Sequence[Sequence[str]], packed: str = "auto"
) -> Iterator[Outcome]:
    """Computes cells in a process of a setting, and yields what they came out as, in order.

    Args:
        setting: Setting of the process.
        cells: Overrides of each cell.
        packed: How the packed models answer, see `Job`.

    Raises:
        RunError: If the process fails.
    """
    job = Job([list(cell) for cell in cells], setting.threads, packed)
    count = str(setting.threads)
    # Threads that wait sleep: spinning, they would take the cores from those that compute.
    threads = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "OMP_WAIT_POLICY": "PASSIVE"}
    process = subprocess.Popen(
        [sys.executable, "-m", "qvlm.tables.portable.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **threads, **setting.environment},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with process.stdin as stdin:
            json.dump(asdict(job), stdin)
        for line in process.stdout:
            yield Outcome(**json.loads(line))
        if code := process.wait():
            raise RunError(f"The process of setting {setting.name!r} ended with code {code}.")
    finally:
        process.kill()
        process.wait()


def differences(reference: Outcome, other: Outcome) -> list[str]:
    """Names what two outcomes of a cell differ in, in words; empty if they are equal."""
    found = []
    names = sorted({*reference.tensors, *other.tensors})
    unequal = [name for name in names if reference.tensors.get(name) != other.tensors.get(name)]
    if unequal:
        found.append(f"{len(unequal)} of {len(names)} tensors, first {unequal[0]}")
    if reference.candidates != other.candidates:
        found.append(f"{other.candidates} candidates instead of {reference.candidates}")
    expected = reference.answers["simulated"]
    for execution, answers in other.answers.items():
        wrong = sum(a != b for a, b in zip(expected, answers, strict=True))
        if wrong:
            found.append(f"{wrong} of {len(answers)} answers, {execution}")
    return found
