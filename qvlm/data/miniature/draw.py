"""Images of 48 x 48 pixels with large plain shapes, which a tower of 8-pixel patches can see.

Every image has a tinted background, a jitter of one pixel and faint noise, so that no two
are equal.
"""

from random import Random

from PIL import Image, ImageChops, ImageDraw

SIDE = 48
COLORS = {
    "red": (215, 40, 40),
    "blue": (40, 70, 215),
    "green": (30, 150, 50),
    "yellow": (240, 215, 40),
    "purple": (140, 50, 170),
    "orange": (245, 140, 20),
    "black": (20, 20, 20),
    "brown": (125, 75, 35),
}
_MODULO_9 = bytes(byte % 9 for byte in range(256))
Box = tuple[float, float, float, float]


class Canvas:
    """An image being drawn. Coordinates are pixels from the top left, all jittered alike."""

    def __init__(self, rng: Random, background: tuple[int, int, int] = (232, 232, 232)) -> None:
        self.rng = rng
        tint = tuple(min(255, max(0, c + rng.randint(-14, 14))) for c in background)
        self.image = Image.new("RGB", (SIDE, SIDE), tint)
        self.pen = ImageDraw.Draw(self.image)
        self.dx, self.dy = rng.randint(-1, 1), rng.randint(-1, 1)

    def _shift(self, points: tuple[float, ...]) -> list[float]:
        return [p + (self.dy if i % 2 else self.dx) for i, p in enumerate(points)]

    def box(self, box: Box, color: str) -> None:
        x0, y0, x1, y1 = self._shift(box)
        self.pen.rectangle((x0, y0, x1 - 1, y1 - 1), fill=COLORS[color])

    def disc(self, x: float, y: float, radius: float, color: str) -> None:
        self.pen.ellipse(
            self._shift((x - radius, y - radius, x + radius, y + radius)), fill=COLORS[color]
        )

    def polygon(self, points: tuple[float, ...], color: str) -> None:
        self.pen.polygon(self._shift(points), fill=COLORS[color])

    def arrow(self, direction: str, color: str, center: tuple[int, int] = (24, 24)) -> None:
        """Draws a thick arrow of 28 pixels around `center` that points left, right, up or down."""
        x, y = center
        shaft, head = (-14, -4, 2, 4), (2, -12, 14, 0, 2, 12)
        turn = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}[direction]

        def place(points: tuple[int, ...]) -> list[tuple[int, int]]:
            pairs = list(zip(points[::2], points[1::2], strict=True))
            return [
                (x + a * turn[0] - b * turn[1], y + a * turn[1] + b * turn[0]) for a, b in pairs
            ]

        (x0, y0), (x1, y1) = place(shaft)
        self.box((min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)), color)
        self.polygon(tuple(c for point in place(head) for c in point), color)

    def finish(self) -> Image.Image:
        """Returns the image with faint noise."""
        drawn = self.rng.randbytes(SIDE * SIDE * 3).translate(_MODULO_9)
        noise = Image.frombytes("RGB", (SIDE, SIDE), drawn)
        return ImageChops.add(self.image, noise, offset=-4)  # from -4 to 4
