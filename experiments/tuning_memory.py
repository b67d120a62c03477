"""Peak memory of tuning the vision tower through a large language model: Q-VLM's VEO, at full size.

`python -m experiments.tuning_memory` builds a LLaVA-13B of a few layers with random weights in
bfloat16, quantizes it as VEO's simulation does, and makes the gradients of one step: in fresh
processes with more and fewer layers of decoder and tower, with layers computed again in the
backward pass and without. Memory grows by the same amount with every layer, so the peak of all
layers follows from what a layer adds; it is extrapolated. The simulation and the tuning have peaks
of their own. Memory is the resident set as Linux counts it, without that of Python and its
libraries. Neither time nor memory depends on the values of weights.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from qvlm.command import run_command
from qvlm.markdown import table
from qvlm.methods.qvlm.dependency import element_joint
from qvlm.methods.qvlm.search_options import SearchOptions
from qvlm.methods.qvlm.simulation import simulate, tower_layers
from qvlm.methods.qvlm.vision import fine_tune
from qvlm.methods.qvlm.vision_loss import Tuning, reference
from qvlm.models.architectures import architecture
from qvlm.models.networks import image_tokens
from qvlm.quantization import Walk
from qvlm.runtime.processes import in_fresh_process
from qvlm.tables.gpu.forms import W4A4
from qvlm.tables.table4_scale.models import place, shortened

MIB, PROCESS = 2**10, Path("/proc/self")  # MiB per GiB; KiB in Linux's files


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        model: Option of conf/model.
        decoder, tower: Numbers of layers.
        rows: Number of image-text pairs of a batch.
        text: Number of text tokens of a pair.
        checkpointing: See `Tuning`.
    """

    model: str
    decoder: int
    tower: int
    rows: int
    text: int
    checkpointing: bool


def peak() -> float:
    """Returns the largest resident set in GiB since the last call, and begins anew."""
    found = re.search(r"VmHWM:\s+(\d+) kB", (PROCESS / "status").read_text())
    assert found is not None
    (PROCESS / "clear_refs").write_text("5")
    return int(found[1]) / MIB**2


def measured(setting: Setting) -> tuple[float, float]:
    """Makes one step of the tuning; returns the peaks of simulation and of tuning in GiB."""
    torch.manual_seed(0)
    before = peak()
    whole = architecture(setting.model)
    model = place(
        shortened(whole, setting.decoder, setting.tower), _as_it_is, "cpu", torch.bfloat16
    )
    batch = _batch(setting)
    references = [reference(model, batch)]
    # The float linears stay, because the tuning is undone for the search.
    floats = simulate(Walk(model, [batch], W4A4.quantization(128)), SearchOptions((1.0,)))
    simulation = peak() - before
    tuning = Tuning(epochs=1, batch_size=setting.rows, checkpointing=setting.checkpointing)
    fine_tune(model, [batch], references, tower_layers(model), element_joint, tuning)
    assert floats
    return simulation, peak() - before


def _as_it_is(kind: str, block: nn.Module) -> None:
    """Leaves a block in floating point."""


def _batch(setting: Setting) -> dict[str, Tensor]:
    whole = architecture(setting.model)
    image, side = image_tokens(whole), whole.vision_config.image_size
    ids = torch.randint(1, 30_000, (setting.rows, image + setting.text))
    ids[:, 1 : 1 + image] = whole.image_token_id
    pixels = torch.randn(setting.rows, 3, side, side, dtype=torch.bfloat16)
    return {"input_ids": ids, "pixel_values": pixels}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table and returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="llava_13b", help="option of conf/model")
    parser.add_argument("--rows", type=int, default=2, help="pairs of a batch (default: 2)")
    parser.add_argument("--text", type=int, default=60, help="text tokens of a pair (default: 60)")

    def work(options: argparse.Namespace) -> None:
        whole = architecture(options.model)
        layers = whole.text_config.num_hidden_layers, whole.vision_config.num_hidden_layers
        rows = []
        for checkpointing in (True, False):
            make = partial(
                Setting,
                options.model,
                rows=options.rows,
                text=options.text,
                checkpointing=checkpointing,
            )
            peaks = [
                in_fresh_process(measured, make(decoder=d, tower=t))
                for d, t in ((1, 2), (3, 2), (1, 6))
            ]
            again = "computed again" if checkpointing else "kept"
            for part, (base, decoder, tower) in zip(
                ("simulation", f"tuning, activations {again}"),
                zip(*peaks, strict=True),
                strict=True,
            ):
                each = (decoder - base) / 2, (tower - base) / 4
                total = base + (layers[0] - 1) * each[0] + (layers[1] - 2) * each[1]
                rows.append([part, *(f"{x:.2f}" for x in (base, *each)), f"{total:.1f}"])
                print(rows[-1], file=sys.stderr, flush=True)
        print(
            table(["GiB", "1 + 2 layers", "a decoder layer", "a tower layer", "all layers"], rows)
        )

    return run_command(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
