"""How much each calibration token counts: as much as the float model is sure of what follows it.

GPTQ treats all calibration tokens alike, and most of them stand where nobody asks the model
anything: image patches, or words of a question that could go on in many ways. An answer goes wrong
where the model decides. The weight of a token t is therefore the probability that the model in
floating point gives the token that does follow, plus a floor for all:

    w_t = p(x_{t+1} | x_1 .. x_t) + floor

Image tokens and the last token of a row have the floor alone. In a text that the model predicts
well (an answer that it was tuned to give) the weights are near one; elsewhere near the floor.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from qvlm.quantization.precision import settled


@torch.no_grad()
def confidence(
    model: nn.Module, batches: Sequence[Mapping[str, Tensor]], floor: float
) -> list[Tensor]:
    """Computes the weights of calibration tokens.

    Args:
        model: Model in floating point.
        batches: Keyword arguments of the model's forward, without padding.
        floor: Weight of a token of which the model is not sure at all.

    Returns:
        For each batch the weights of its tokens, [rows * tokens] float64.
    """
    image = getattr(model.config, "image_token_id", None)
    weights = []
    for batch in batches:
        following = batch["input_ids"][:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1]
        known = following.clamp_max(logits.shape[-1] - 1)  # an image token may have no logit
        chosen = logits.gather(-1, known[..., None])[..., 0].double()
        sure = (chosen - logits.double().logsumexp(-1)).exp()
        if image is not None:
            sure = sure.masked_fill(following == image, 0)
        weights.append(settled(nn.functional.pad(sure, (0, 1)).flatten()).double() + floor)
    return weights
