"""Checks of a cell's options that need neither checkpoint nor data.

They run before the first cell of a sweep does, so that a mistyped option costs seconds and not the
hours of the cells before it. What only shows once model and data are loaded (a truncated
checkpoint, a missing column, a split that is too small) is a `UserError` of the cell itself, which
has written nothing by then.
"""

import os
from pathlib import Path

from qvlm.cell.inputs import MPS, find_device, prompting, quantization_config
from qvlm.cell.method import method_of, not_streamable
from qvlm.config.schema import MAP, RunConfig
from qvlm.data.sizes import MINIATURE_SIZES
from qvlm.errors import UserError
from qvlm.evaluation.vqa.questions import require_data
from qvlm.models.placement import memory_limits
from qvlm.packing import kernels, partial_folder, resolve_folder
from qvlm.records.cells import cells_in
from qvlm.records.record import require_writable
from qvlm.validation import one_of


def check_options(config: RunConfig) -> None:
    """Makes sure that a cell can start, as far as its options tell.

    Raises:
        UserError: if an option is wrong; the sentence names the option and what it accepts.
    """
    method = method_of(config)
    if config.stream and not getattr(method, "one_pass", True):
        raise not_streamable(method.name)
    one_of("kernel", config.kernel, kernels.names())
    if config.packed and config.model.dtype == "float64":
        _check_kernel_of_float64(config.kernel)
    one_of("data.split", config.data.split, MINIATURE_SIZES)
    one_of("calibration.split", config.calibration.split, MINIATURE_SIZES)
    prompting(config)
    if find_device(config.device) == MPS and not config.full_precision:
        raise UserError(
            "device=mps is not possible for a quantized model, because the proof of its bits needs "
            "float64, which MPS does not have. Give device=cpu, or method=fp."
        )
    _check_task_folders(config)
    if config.committed is not None:
        cells_in(Path(config.committed))  # there is such a folder, and it is intact
    if config.device == MAP:
        memory_limits(config.max_memory)
    if not config.full_precision:
        quantization_config(config)
        _check_packable(config)
        _check_prompts(config)
    require_writable(config.runs_dir)
    if config.save_packed is not None:
        if os.path.lexists(config.save_packed) and not os.path.isdir(config.save_packed):
            raise UserError(
                f"save_packed={config.save_packed} is not a folder. Give a new or an empty one."
            )
        require_writable(partial_folder(resolve_folder(config.save_packed)), "save_packed")


def _check_task_folders(config: RunConfig) -> None:
    """Refuses folders of tasks that do not exist, and tasks whose data are not there."""
    for option in ("include_path", "folder"):
        folder = getattr(config.tasks, option)
        if folder is not None and not os.path.isdir(folder):
            raise UserError(f"tasks.{option}={folder} is not a folder. Give an existing one.")
    require_data(config.tasks.names, config.tasks.folder)


def _check_packable(config: RunConfig) -> None:
    """Refuses packed execution of a quantizer that has no packed form."""
    quantizer = config.quantizer
    for option, value in (
        ("quantizer.first_token", quantizer.first_token),
        ("quantizer.language.granularity", quantizer.language.granularity),
        ("quantizer.vision.granularity", quantizer.vision.granularity),
    ):
        if config.packed and value in ("float", "per_channel_prompt"):
            raise UserError(
                f"{option}={value} is not for packed execution, which has no integer product for "
                "it. Give execution=simulated."
            )


def _check_prompts(config: RunConfig) -> None:
    """Refuses ranges of a prompt that padding or its neighbors would enter."""
    of_prompt = config.quantizer.language.granularity == "per_channel_prompt"
    if of_prompt and not config.on_text and config.evaluation.batch_size > 1:
        raise UserError(
            f"evaluation.batch_size={config.evaluation.batch_size} is not for "
            "quantizer.language.granularity=per_channel_prompt (quantizer=released), because the "
            "padding of a batch would count among a prompt's ranges. Give evaluation.batch_size=1."
        )


def _check_kernel_of_float64(kernel: str) -> None:
    """Raises a UserError if a kernel's sums are less precise than a model in float64."""
    precise = [kernel.name for kernel in kernels.KERNELS if kernel.can_sum_in_float64]
    if kernel not in (kernels.AUTO, *precise):
        raise UserError(
            f"kernel={kernel} does not sum in float64, as model.dtype=float64 asks for. Choose one "
            f"of: {', '.join((kernels.AUTO, *precise))}, or give model.dtype=float32."
        )
