"""The accuracy of a model in training, on generated problems."""

from collections.abc import Sequence
from typing import Any

import torch

from qvlm.models import LoadedModel


@torch.no_grad()
def accuracy_by_skill(
    loaded: LoadedModel, problems: Sequence[dict[str, Any]], batch_size: int = 128
) -> dict[str, tuple[int, int]]:
    """Returns (right, asked) per skill, by greedy generation and the official parser."""
    loaded.model.eval()
    found: dict[str, tuple[int, int]] = {}
    order = sorted(range(len(problems)), key=lambda i: problems[i]["image"] is not None)
    for begin in range(0, len(order), batch_size):
        rows = [problems[i] for i in order[begin : begin + batch_size]]
        encoded = loaded.encode(rows)
        ids = loaded.model.generate(**encoded, max_new_tokens=48, do_sample=False)
        for problem, text in zip(
            rows, loaded.decode(ids[:, encoded["input_ids"].shape[1] :]), strict=True
        ):
            hit = loaded.prompting.parse(text, len(problem["choices"])) == problem["answer"]
            right, asked = found.get(problem["skill"], (0, 0))
            found[problem["skill"]] = (right + hit, asked + 1)
    loaded.model.train()
    return found
