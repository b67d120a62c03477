"""No error without data: a search over nothing would let the first candidate win."""

import pytest
import torch

from qvlm.errors import RunError
from qvlm.methods.objective import mean_squared_error, output_error


@pytest.mark.parametrize("targets", [[], [torch.empty(0, 4)]])
def test_an_error_without_data_is_refused(targets: list[torch.Tensor]) -> None:
    for normalize in (False, True):
        with pytest.raises(RunError, match="no calibration data"):
            output_error(targets, targets, normalize)
    with pytest.raises(RunError, match="no calibration data"):
        mean_squared_error(targets, targets)


def test_the_mean_squared_error_counts_every_element_once() -> None:
    targets = [torch.zeros(2, 3), torch.zeros(1, 2)]
    outputs = [torch.full((2, 3), 2.0), torch.zeros(1, 2)]
    assert mean_squared_error(outputs, targets) == 6 * 4 / 8
