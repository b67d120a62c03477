"""Peak memory and time of quantizing a model that is larger than memory, at full size.

`python -m experiments.streaming` writes a random checkpoint of the shape of LLaVA-7B, one layer at
a time. It has 13 GiB in half precision and the layout of its authors: shards of safetensors with an
index. A fresh process quantizes it with the command that docs/streaming.md gives. Another fresh
process loads the packed checkpoint and proves its bits. For both, the script prints the seconds and
the peak of resident memory as Linux counts it, including pages of mapped files. It deletes the
folder at the end.

The weights are random and the tokenizer is trained on generated problems, so no question is asked.
Time and memory do not depend on that.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, PreTrainedTokenizerFast

try:
    import resource
except ImportError:
    sys.exit("error: this experiment reads the peak memory as Linux counts it. Run it on Linux.")

from qvlm.command import run_command
from qvlm.data import miniature
from qvlm.data.prompts import Prompting
from qvlm.errors import RunError
from qvlm.models.architectures import KNOWN, clip_tower
from qvlm.models.checkpoints.families import read_blueprint
from qvlm.models.load import load_model
from qvlm.models.meta import meta_model
from qvlm.packing import measure_packed_bits, read_origin
from qvlm.planning.footprint import GIB
from qvlm.quantization import check_bits
from qvlm.quantization.targets import block_layers
from qvlm.runtime.processes import in_fresh_process

ROOT = Path(__file__).resolve().parents[1]
KIB = 2**10
MODELS = tuple(name for name in KNOWN if name != "moe_llava")


@torch.no_grad()
def write_checkpoint(
    folder: Path, content: Mapping[str, Any], vision: CLIPVisionConfig | None = None
) -> int:
    """Writes a random checkpoint of LLaVA's family in its authors' layout.

    Args:
        folder: Folder for `checkpoint`, and for `clip`, which has the configuration of the vision
            tower without weights.
        content: Content of the checkpoint's config.json.
        vision: Configuration of the vision tower, whose weights the checkpoint contains. None
            stands for the tower that `content` names.

    Returns:
        Bytes of the weights.
    """
    checkpoint, tower = folder / "checkpoint", folder / "clip"
    checkpoint.mkdir(parents=True)
    tower.mkdir()
    content = {**content, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = vision or clip_tower(content["mm_vision_tower"])
    built = read_blueprint(content, "it").architecture(vision, "it")
    _write_tokenizer(checkpoint)
    (checkpoint / "config.json").write_text(json.dumps(content, indent=2))
    (tower / "config.json").write_text(json.dumps({"vision_config": vision.to_dict()}))
    side = vision.image_size
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    CLIPImageProcessorPil(**size).save_pretrained(tower)

    empty = meta_model(built, torch.float16)
    blocks = list(block_layers(empty, vision_tower=True))
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in [*blocks, ""]}
    for name, tensor in empty.state_dict().items():
        block = next((block for block in blocks if name.startswith(f"{block}.")), "")
        parts[block][_original_name(name, content)] = tensor
    generator = torch.Generator().manual_seed(0)
    placed: dict[str, str] = {}
    total = 0
    for number, part in enumerate(parts.values(), start=1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        drawn = {name: _drawn(name, tensor, generator) for name, tensor in part.items()}
        save_file(drawn, checkpoint / file, {"format": "pt"})
        placed |= dict.fromkeys(part, file)
        total += sum(tensor.nbytes for tensor in drawn.values())
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return total


def _original_name(name: str, content: Mapping[str, Any]) -> str:
    """Returns the name that LLaVA gives to one of our tensors."""
    numbered = "mm_projector_type" in content  # a projector with one layer has no number
    for ours, theirs in (
        ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
        ("model.multi_modal_projector.linear_1.", f"model.mm_projector.{'0.' * numbered}"),
        ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
        ("model.language_model.", "model."),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def _drawn(name: str, shape: Tensor, generator: torch.Generator) -> Tensor:
    """Returns a random matrix, or the vector of a norm or bias as it is before training."""
    if shape.ndim > 1:
        return torch.empty(shape.shape).normal_(std=0.02, generator=generator).to(shape.dtype)
    return torch.full(shape.shape, float("norm" in name and name.endswith("weight"))).to(
        shape.dtype
    )


def _write_tokenizer(folder: Path) -> None:
    """Writes a tokenizer with few byte pairs: words take several tokens, as in real prompts."""
    prompting = Prompting()
    problems = miniature.generate("train", 2000, seed=0)
    special = ["<unk>", "<s>", "</s>"]
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[AddedToken(token, special=True) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(map(prompting.prompt, problems), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


@dataclass(frozen=True)
class Process:
    """Cost of a process.

    Attributes:
        seconds: Wall time in seconds.
        peak: Peak resident memory in bytes, including pages of mapped files.
    """

    seconds: float
    peak: int

    def __str__(self) -> str:
        return f"{self.seconds:.0f} s, peak of resident memory {self.peak / GIB:.2f} GiB"


def run(words: Sequence[str]) -> Process:
    """Runs `run.py` in a process of its own.

    Args:
        words: Overrides of the configuration.

    Raises:
        RunError: If it fails.
    """
    print(f"python run.py {shlex.join(words)}", flush=True)
    started = time.perf_counter()
    child = subprocess.Popen([sys.executable, "run.py", *words], cwd=ROOT)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise RunError(f"run.py ended with exit code {child.returncode}")
    return Process(time.perf_counter() - started, usage.ru_maxrss * KIB)


def prove(folder: Path) -> tuple[int, int, Process]:
    """Loads a packed checkpoint and counts the codes that enter its products on one problem.

    Args:
        folder: Folder of the checkpoint.

    Returns:
        Number of layers, number of layers that take more values than their bits allow, and cost.
    """
    started = time.perf_counter()
    origin = read_origin(folder)
    loaded = load_model(folder, "packed", dtype=origin.options["model"]["dtype"])
    problem = next(row for row in miniature.generate("test", 20, seed=0) if row["image"])
    rows = measure_packed_bits(loaded.model, origin.expected, [loaded.encode([problem], True)])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
    return len(rows), len(check_bits(rows)), Process(time.perf_counter() - started, peak)


def measure(folder: Path, options: argparse.Namespace) -> None:
    """Writes the checkpoint, quantizes it, proves the result, and prints what each step took."""
    started = time.perf_counter()
    # In a process of its own, because the peak of a child starts at the memory of its parent.
    size = in_fresh_process(write_checkpoint, folder, KNOWN[options.model])
    seconds = time.perf_counter() - started
    print(f"checkpoint: {size / GIB:.1f} GiB, written in {seconds:.0f} s", flush=True)
    packed = folder / "packed"
    words = [f"model={options.model}", f"model.path={folder}/checkpoint", "bits=w4a4"]
    words += [f"model.vision_tower={folder}/clip", f"model.dtype={options.dtype}", "tracking=off"]
    words += [f"method={options.method}", f"calibration.samples={options.samples}", "stream=true"]
    words += [f"save_packed={packed}", "evaluate=false", f"results_dir={folder}/results"]
    print(f"quantized: {run(words)}", flush=True)
    size = sum(file.stat().st_size for file in packed.iterdir())
    layers, exceeding, cost = in_fresh_process(prove, packed)
    print(
        f"packed checkpoint: {size / GIB:.1f} GiB, {layers} layers, {exceeding} exceed their bits"
    )
    print(f"loaded and run on one problem: {cost}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="llava_7b")
    parser.add_argument("--method", default="rtn", help="any method that can be streamed")
    parser.add_argument("--samples", type=int, default=4, help="number of calibration problems")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of what is not quantized")
    parser.add_argument(
        "--folder", type=Path, help="folder for the checkpoints (default: a temporary one)"
    )

    def work(options: argparse.Namespace) -> None:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            measure(Path(folder), options)

    return run_command(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
