"""Jobs that need no PyTorch, for the launchers: what they do is a word."""

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from qvlm.errors import RunError
from qvlm.records.locks import Held, Lock
from qvlm.sweep.job import Job, Launcher, Outcome
from tests.helpers.configs import load


@dataclass
class LightJob(Job):
    """Does as `word` says, in the folder that it is started for."""

    word: str = ""

    def __call__(self) -> Outcome:
        os.chdir(self.folder)
        match self.word:
            case "fail":
                return RunError("a layer is NaN")
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stay":  # until it is started again
                with Lock(Path("runs") / "stay"):
                    if not Path("stayed").exists():
                        Path("stayed").touch()
                        time.sleep(60)
            case "held":
                return Held(Path("runs") / "held", None)
        Path(self.word).write_text(f"{os.getpid()} {sys.argv}")
        return Path(self.word)


def run(launcher: Launcher, *words: str) -> list[Outcome]:
    """The outcomes of jobs that do these words, in order."""
    cell: Any = SimpleNamespace(config=load("device=cpu"))  # a Cell would import PyTorch
    outcomes = dict(launcher.launch([LightJob(cell, word=word) for word in words]))
    return [outcomes[index] for index in range(len(words))]


def workers(*words: str) -> set[int]:
    """The processes that the cells ran in; none of them may be this one."""
    pids = {int(Path(word).read_text().split()[0]) for word in words}
    assert os.getpid() not in pids
    return pids
