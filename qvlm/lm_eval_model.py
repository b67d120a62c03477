"""Our models for lm-eval's own command line and Python functions, under the name "qvlm".

    qvlm lm-eval --model qvlm --model_args packed=FOLDER --tasks arc_easy

lm-eval 0.4 has no entry point for models of other packages: it knows those that were registered in
its process. `import qvlm` registers this one (`qvlm.registration`), and the command above is
lm-eval's own after that import. In Python `lm_eval.simple_evaluate(model="qvlm", ...)` needs the
import alone.
"""

import sys
from collections.abc import Sequence
from typing import Any

from qvlm import api
from qvlm.command import guarded
from qvlm.errors import RunError, UserError
from qvlm.evaluation.adapter import InMemoryModel

# What lm-eval's command line names if nothing is given, with a GPU or without. device=auto is that
# GPU, where there is one.
LM_EVAL_DEVICE = "cuda:0"


class QvlmModel(InMemoryModel):
    """A packed model, or one that is quantized in memory, whose bits are proven before it answers.

    Args:
        packed: Folder that `save_packed` wrote.
        model: Option of `model=`, if there is no packed model.
        method: Option of `method=`, which quantizes that model; "fp" leaves it as it is.
        bits: Option of `bits=`.
        batch_size: Number of requests per batch.
        device: Option of `device=`; None and `LM_EVAL_DEVICE` stand for "auto".
        max_batch_size: Argument of lm-eval without an effect.
        overrides: Further options, such as `data` or `calibration.samples`.

    Raises:
        UserError: If an option is wrong, or the model is missing or damaged.
        RunError: If the bits are not proven.
    """

    def __init__(
        self,
        packed: str | None = None,
        model: str | None = None,
        method: str = "rtn",
        bits: str = "w4a4",
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        **overrides: Any,
    ) -> None:
        if (packed is None) == (model is None):
            raise UserError("--model_args needs either packed=FOLDER or model=NAME.")
        size = int(batch_size) if str(batch_size).isdecimal() else 0
        if size < 1:
            raise UserError(f"batch_size={batch_size} is not accepted. Give at least 1.")
        words = [f"{key}={value}" for key, value in overrides.items()]
        words += [] if device in (None, LM_EVAL_DEVICE) else [f"device={device}"]
        loaded = api.load(str(packed or model), *words)
        if packed is None and method != "fp":
            api.quantize(loaded, method, bits)
        if not loaded.bits.is_full_precision:
            _require_proof(loaded)
        super().__init__(loaded.loaded, size)
        self.model = loaded

    def get_model_info(self) -> dict[str, Any]:
        """Returns what lm-eval writes about the model: how it was quantized."""
        config = self.model.config
        return {
            "model_name": config.model.name,
            "method": self.model.method,
            "bits": config.bits.label,
            "model_dtype": config.model.dtype,
        }


def _require_proof(model: api.Model) -> None:
    proof = api.prove(model)
    if not proof.holds:
        layer = proof.failing[0] if proof.failing else model.loaded.name
        raise RunError(f"{layer} is not proven to compute with {model.bits} values")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs lm-eval's command line and returns its exit code."""
    from lm_eval.__main__ import cli_evaluate

    given = list(sys.argv[1:] if arguments is None else arguments)
    before, sys.argv = sys.argv, ["lm-eval", *given]
    try:
        return guarded(cli_evaluate)
    except SystemExit as done:  # --help, and what lm-eval itself refuses
        return done.code if isinstance(done.code, int) else 0
    finally:
        sys.argv = before
