"""Images of a data set: decoded once when the data is read, and converted where the mode is odd."""

import io
from typing import Any

import datasets
import numpy as np
from PIL import Image

# Modes that every later step takes, saving as PNG included.
PLAIN_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")


def decode(content: bytes) -> Image.Image:
    """Decodes an image as `datasets` does, orientation included.

    Raises:
        ValueError: If the bytes are not an image.
    """
    encoded: dict[str, Any] = {"bytes": content, "path": None}
    try:
        image = datasets.Image().decode_example(encoded)
        image.load()
    except Exception as error:  # decoders of damaged files raise errors of any type
        raise ValueError(str(error) or type(error).__name__) from error
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to RGB. Everything that shows an image to a model calls this.

    Transparency is dropped, as in LLaVA's own code, and not laid on a background. 16-bit and
    32-bit integers and floats are scaled to 0..255: floats within 0..1 by 255, other values above
    255 by 255 / 65535, and what is then out of range is clipped.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image.convert("RGB")
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=255.0, neginf=0.0)
    largest = values.max(initial=0.0)
    if image.mode == "F" and largest <= 1:
        values = values * 255
    elif largest > 255:
        values = values * (255 / 65535)
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")


def as_png(image: Image.Image) -> bytes:
    """Encodes an image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
