"""What a page of records does not wait for."""

import subprocess
import sys

import pytest

from qvlm.routes import ROUTES

SLOW = ("torch", "transformers", "datasets", "lm_eval", "wandb", "matplotlib")
# Commands that are functions of recorded answers, or of what the paper prints.
PURE = (
    *("table1", "table2", "table2-real", "table3", "table5", "table6", "table-real"),
    *("ablation", "calibration", "claims", "audit", "diff", "gate"),
)


@pytest.mark.parametrize("command", PURE)
def test_a_page_of_records_loads_no_model_library(command: str) -> None:
    module = ROUTES[command].module
    code = f"import sys, {module}; print([name for name in {SLOW} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
