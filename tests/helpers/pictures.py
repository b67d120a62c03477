"""Pictures of modes that models do not read as they are."""

import numpy as np
from PIL import Image

ODD_MODES = ("RGBA", "LA", "I;16", "F")


def odd_picture(mode: str) -> Image.Image:
    """A picture of 24 x 24 that is 40 of 255 at the top left and 200 at the bottom right.

    With an alpha band, its upper half is transparent.
    """
    gray = np.linspace(40, 200, 24 * 24).reshape(24, 24)
    if mode == "I;16":
        return Image.fromarray((gray * 257).astype(np.uint16))
    if mode == "F":
        return Image.fromarray((gray / 255).astype(np.float32))
    picture = Image.fromarray(gray.astype(np.uint8)).convert(mode)
    alpha = np.zeros((24, 24), np.uint8)
    alpha[12:] = 255
    picture.putalpha(Image.fromarray(alpha))
    return picture
