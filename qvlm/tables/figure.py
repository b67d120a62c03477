"""The style of every committed figure."""

from pathlib import Path

STYLE = Path(__file__).with_name("figure.mplstyle")
