"""What static ranges clip: by hand, and on a few questions of a miniature."""

import pytest
import torch

from experiments import clipping
from qvlm.quantization import UniformQuantizer
from tests.helpers.pages import cells


def test_the_energy_outside_a_range_is_that_of_what_is_cut_off() -> None:
    quantizer = UniformQuantizer.from_range(torch.tensor([0.0, -3.0]), torch.tensor([3.0, 0.0]), 2)
    x = torch.tensor([[1.0, -5.0], [5.0, 1.0]])  # beyond the ends by 0, 2; 2, 1
    assert clipping.clipped_energy(x, quantizer) == pytest.approx((9.0, 52.0))


@pytest.mark.slow
def test_pairs_clip_what_questions_without_an_image_need(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert clipping.main(["--models", "mini_llava", "--questions", "24"]) == 0
    pairs, every = (cells(line) for line in capsys.readouterr().out.splitlines()[2:])
    assert [pairs[:2], every[:2]] == [
        ["mini_llava", "image-text pairs"],
        ["mini_llava", "all problems"],
    ]
    assert float(pairs[3]) > 2 * float(pairs[2]) > 0
    assert float(pairs[3]) > 2 * float(every[3]) > 0


def test_a_model_that_is_not_there_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert clipping.main(["--models", "nothing"]) == 2
    assert "nothing" in capsys.readouterr().err
