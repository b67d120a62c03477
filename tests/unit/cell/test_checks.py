"""What is refused before a cell reads anything."""

import pytest

from qvlm.cell.checks import check_options
from qvlm.errors import UserError
from tests.helpers.configs import load


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        *(
            (
                f"execution=packed kernel={kernel}",
                f"kernel={kernel} does not sum in float64, as model.dtype=float64 asks for. Choose "
                "one of: auto, native, int_mm, reference, or give model.dtype=float32.",
            )
            for kernel in ("bf16", "int4_weight_only", "triton")
        ),
        ("execution=packed kernel=fast", "kernel=fast is not a known value. Choose one of: auto,"),
        ("stream=true save_packed=x method=qvlm", "stream=true is not possible with Q-VLM"),
        ("device=tpu", "device=tpu is not on this machine. Choose one of: auto, cpu"),
        ("+method.step=1", "method.step is not a parameter of RTN. It has no parameters."),
        ("method._target_=no.such.Method", "method._target_=no.such.Method is not importable"),
        ("method._target_=pathlib.Path", "method._target_=pathlib.Path is not a method."),
        ("model.prompt_format=none", "model.prompt_format: "),
        ("quantizer.weight.granularity=rows", "quantizer, weight: "),
        ("results_dir=/proc/nowhere", "/proc/nowhere"),
    ],
)
def test_a_wrong_option_is_one_sentence(words: str, sentence: str) -> None:
    with pytest.raises(UserError) as refusal:
        check_options(load(*words.split()))
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


NARROW = "execution=packed kernel=bf16 model.dtype=bfloat16"


@pytest.mark.parametrize("words", ["", "method=fp", "execution=packed kernel=reference", NARROW])
def test_what_can_start_is_accepted(words: str) -> None:
    check_options(load(*words.split()))


def test_ranges_of_a_prompt_need_batches_of_one() -> None:
    with pytest.raises(UserError, match="evaluation.batch_size=128 is not for") as refusal:
        check_options(load("quantizer=released"))
    assert "\n" not in str(refusal.value)
    check_options(load("quantizer=released", "evaluation.batch_size=1"))
    check_options(load("quantizer=released", "model=smollm2", "data=text"))
