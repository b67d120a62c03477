"""Peak memory of tuning the vision tower through a large language model: Q-VLM's VEO, at full size.

`python -m experiments.tuning_memory` builds a LLaVA-13B of a few layers with random weights in
bfloat16, quantizes it as VEO's simulation does, and makes the gradients of one step: in fresh
processes with more and fewer layers of decoder and tower, with layers computed again in the
backward pass and without. Memory grows by the same amount with every layer, so the peak of all
layers follows from what a layer adds; it is marked as extrapolated. Memory is the resident set as
Linux counts it, without that of Python and its libraries. Time and memory do not depend on the
values of weights.
"""

import argparse
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

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

MIB_OF_KIB, GIB = 2**10, 2**30


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
    """Returns the largest resident set of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MIB_OF_KIB / GIB


def measured(setting: Setting) -> float:
    """Makes one step of the tuning, and returns the GiB that it took at its peak."""
    torch.manual_seed(0)
    before = peak()
    whole = architecture(setting.model)
    model = place(
        shortened(whole, setting.decoder, setting.tower), _as_it_is, "cpu", torch.bfloat16
    )
    batch = _batch(setting)
    references = [reference(model, batch)]
    simulate(Walk(model, [batch], W4A4.quantization(128)), SearchOptions(percentiles=(1.0,)))
    tuning = Tuning(epochs=1, batch_size=setting.rows, checkpointing=setting.checkpointing)
    fine_tune(model, [batch], references, tower_layers(model), element_joint, tuning)
    return peak() - before


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
            base, decoder, tower = (
                in_fresh_process(measured, make(decoder=d, tower=t))
                for d, t in ((1, 2), (3, 2), (1, 6))
            )
            each = (decoder - base) / 2, (tower - base) / 4
            total = base + (layers[0] - 1) * each[0] + (layers[1] - 2) * each[1]
            again = "computed again" if checkpointing else "kept"
            rows.append([again, *(f"{x:.2f}" for x in (base, *each)), f"{total:.1f}"])
            print(rows[-1], file=sys.stderr, flush=True)
        head = ["activations", "1 + 2 layers", "a decoder layer", "a tower layer", "all layers"]
        print(table(head, rows))

    return run_command(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
