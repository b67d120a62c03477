"""The Python API: load a model, quantize it, prove its bits, evaluate it, save it packed.

    import qvlm

    model = qvlm.load("mini_llava")
    qvlm.quantize(model, "awq", "w4a4")
    qvlm.prove(model)
    qvlm.evaluate(model, limit=500)
    qvlm.save(model, "packed/awq")
    again = qvlm.load("packed/awq")

Options are those of the command line, in the same words: `qvlm.load("mini_llava", "device=cpu")`.
The steps are those of `qvlm.cell.pipeline`, so a model that is made here gives the numbers of the
cell with the same options. What it leaves out is the record: `qvlm` on the command line writes one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image

from qvlm.bits import BitWidths
from qvlm.cell import inputs, text
from qvlm.cell.findings import Quantized
from qvlm.cell.identity import Cell, resolve
from qvlm.cell.material import calibration_batches, load_material
from qvlm.cell.method import build_method
from qvlm.cell.origin import describe_origin, expected_of
from qvlm.cell.walk import ProgressWalk
from qvlm.config.compose import CONF, compose
from qvlm.config.schema import RunConfig
from qvlm.data.prompts import pictures_of
from qvlm.data.sources import table_split
from qvlm.errors import RunError, UserError
from qvlm.evaluation import likelihood
from qvlm.evaluation.evaluator import Evaluation
from qvlm.evaluation.evaluator import evaluate as evaluate_model
from qvlm.evaluation.text import evaluate_text
from qvlm.methods.base import MethodReport
from qvlm.models.cache import CACHE, growing_cache
from qvlm.models.loaded import LoadedModel
from qvlm.models.packed import save_packed_model
from qvlm.packing import Origin, measure_packed_bits, pack_model, packed_layers, read_origin
from qvlm.quantization import (
    LayerBits,
    check_bits,
    expected_layers,
    measure_bits,
)
from qvlm.validation import whole_number


@dataclass
class Model:
    """A model in memory: in full precision, quantized, or packed.

    Attributes:
        overrides: Words of the command line that it was loaded with.
        config: Options that it was made with, all of them.
        loaded: Network, tokenizer and image processor.
        method: Name of the method that quantized it, as tables print it.
        expected: Names of the layers that must be quantized.
        quantized: What quantizing it found out.
        origin: How it was made, if it was loaded from a packed checkpoint.
    """

    overrides: list[str]
    config: RunConfig
    loaded: LoadedModel
    method: str = "FP"
    expected: list[str] = field(default_factory=list)
    quantized: Quantized = field(default_factory=Quantized)
    origin: Origin | None = None

    @property
    def bits(self) -> BitWidths:
        """Bits per weight and per activation."""
        return self.config.bits

    @property
    def is_packed(self) -> bool:
        """Whether its layers store and multiply codes."""
        return bool(packed_layers(self.loaded.model))

    def ask(
        self,
        question: str,
        choices: Sequence[str],
        image: Image.Image | Sequence[Image.Image] | None = None,
        hint: str = "",
    ) -> str:
        """Returns the model's answer to a question, without special tokens.

        Args:
            question: Text of the question.
            choices: Texts that the model chooses from.
            image: Image that the question is about, of any size and mode. A model of a family
                (`model=hf`) accepts several.
            hint: Text that belongs to the question.

        Raises:
            UserError: If the question leaves no room for an answer in the model's context, the
                choices are one text, or an image is none of Pillow's.
        """
        if isinstance(choices, str):
            raise UserError(f"choices={choices!r} is one text. Give a list of texts.")
        for picture in pictures_of(image):
            if not isinstance(picture, Image.Image):
                raise UserError(
                    f"image={picture!r:.60} is not an image. Give PIL.Image.open(FILE), or None."
                )
        problem = {"question": question, "choices": choices, "image": image, "hint": hint}
        batch = self.loaded.encode([problem])
        prompt, limit = batch["input_ids"].shape[1], inputs.answer_length(self.config)
        limit = likelihood.room_for_answer(self.loaded, prompt, limit, "the question")
        network: Any = self.loaded.model
        with torch.inference_mode():
            tokens = network.generate(
                **batch,
                **{CACHE: growing_cache(network)},
                do_sample=False,
                max_new_tokens=limit,
            )
        return self.loaded.decode(tokens[:, prompt:])[0]


@dataclass(frozen=True)
class Proof:
    """The proof of bits of a model: what entered each product while it answered questions.

    Attributes:
        layers: Distinct values per scale that were counted in each layer.
        failing: Names of the layers that take more values than their bits allow, or none at all.
    """

    layers: list[LayerBits]
    failing: list[str]

    @property
    def holds(self) -> bool:
        """Whether every layer computes with the bits that it claims."""
        return bool(self.layers) and not self.failing


def load(model: str | Path, *overrides: str) -> Model:
    """Loads a model in full precision, or one that `save` wrote.

    Args:
        model: Option of `model=` such as "mini_llava", or folder of a packed checkpoint.
        overrides: Options of the command line, such as "device=cpu" or "model.path=FOLDER".

    Raises:
        UserError: If an option is wrong, or the checkpoint is missing or damaged.
    """
    if (CONF / "model" / f"{model}.yaml").is_file():
        given = [f"model={model}", *overrides]
    elif Path(model).is_dir():
        given = [f"model.packed={_quoted(model)}", *overrides]
    else:
        names = ", ".join(sorted(path.stem for path in (CONF / "model").glob("*.yaml")))
        raise UserError(
            f"{model} is not a model. Give the folder of a packed model, or choose one of: {names}."
        )
    whole = [] if Path(model).is_dir() else ["method=fp", "bits=fp"]
    config = resolve(compose([*given, *whole]))
    device = inputs.find_device(config.device)
    inputs.settle(config, device)
    loaded = Model(given, config, inputs.load(config, device))
    if config.model.packed is not None:
        loaded.origin = read_origin(config.model.packed)
        loaded.method = loaded.origin.method
        loaded.expected = expected_of(loaded.loaded, config)
    return loaded


def quantize(
    model: Model, method: str = "rtn", bits: str = "w4a4", *overrides: str
) -> MethodReport:
    """Quantizes a model in place, with calibration problems of its data set.

    Args:
        model: Model in full precision.
        method: Option of `method=`, such as "awq".
        bits: Option of `bits=`, such as "w4a4".
        overrides: Further options, such as "calibration.samples=32".

    Returns:
        What the method reports of itself: seconds and candidates of its search, and details.

    Raises:
        UserError: If an option is wrong, or the model is quantized already.
    """
    if not model.bits.is_full_precision:
        raise UserError(f"{model.loaded.name} is quantized already. Load it again.")
    config = resolve(compose([*model.overrides, f"method={method}", f"bits={bits}", *overrides]))
    if config.full_precision:
        return MethodReport()
    if config.model != model.config.model:
        raise UserError("model is not an option of quantize, but of load. Load it again.")
    chosen = build_method(config.method)
    quantization = inputs.quantization_config(config)
    expected = expected_layers(model.loaded.model, quantization.vision_tower)
    batches, ids = calibration_batches(config, model.loaded)
    walk = ProgressWalk(model.loaded.model, batches, quantization)
    report = chosen.quantize(walk)
    model.config, model.method, model.expected = config, chosen.name, expected
    model.quantized = Quantized(report, ids, list(walk.uncalibrated))
    return report


def prove(model: Model) -> Proof:
    """Counts the distinct values per scale that enter every product of a quantized model.

    Returns:
        The proof, on a few problems of the model's data set.

    Raises:
        UserError: If the model is in full precision, which has nothing to prove.
    """
    if model.bits.is_full_precision:
        raise UserError(f"{model.loaded.name} is in full precision. Quantize it first.")
    batches = load_material(model.config, model.loaded).proof()
    if model.is_packed:
        layers = measure_packed_bits(model.loaded.model, model.expected, batches)
    else:
        quantization = inputs.quantization_config(model.config)
        layers = measure_bits(model.loaded.model, model.expected, batches, quantization)
    return Proof(layers, check_bits(layers))


def evaluate(
    model: Model,
    data: datasets.Dataset | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
) -> Evaluation:
    """Asks a model every question of a data set, and scores its answers.

    Args:
        model: Model of any kind.
        data: Data set with the columns of ScienceQA (`qvlm.data.validation.COLUMNS`). None stands
            for the model's own: the option `data=`, the generated test split by default.
        limit: Number of questions, from the first; None asks all.
        batch_size: Number of questions per batch; None stands for `evaluation.batch_size`.

    Returns:
        Accuracy by class with intervals in `metrics["classes"]`, and every answer. With `data=text`
        the perplexity in `metrics["text"]`, and the sums of each document.

    Raises:
        UserError: If the data cannot be used.
    """
    options = model.config.evaluation
    if data is None:
        limited = replace(options, limit=options.limit if limit is None else limit)
        config = replace(model.config, evaluation=limited)
        if config.on_text:
            documents = text.load_texts(config)
            return evaluate_text(model.loaded, text.score_windows(config, model.loaded, documents))
        problems = inputs.load_problems(config, model.loaded.reads_images)
    else:
        if not len(data):
            raise UserError("data holds no problems. Give a data set with at least one.")
        if limit is not None:
            whole_number("limit", limit, 1, len(data))
        rows = table_split(data, "data", "data", lambda row: f"data, row {row}", None)
        problems = rows.take(range(len(data) if limit is None else limit))
    return evaluate_model(
        model.loaded,
        problems,
        batch_size=batch_size or options.batch_size,
        max_new_tokens=inputs.answer_length(model.config),
        unparsable=options.unparsable,
        scoring=options.scoring,
        seed=model.config.seed,
        temperature=options.temperature,
    )


def save(model: Model, folder: str | Path) -> None:
    """Packs a quantized model in place, if it is not packed yet, and writes it.

    Args:
        model: Quantized model.
        folder: New folder, or one that holds a packed model, which is replaced.

    Raises:
        UserError: If the model is in full precision, or its packed bits are not proven.
        RunError: If the folder cannot be written.
    """
    if model.bits.is_full_precision:
        raise UserError(f"{model.loaded.name} is in full precision. Quantize it first.")
    config = replace(model.config, save_packed=str(folder), execution="packed")
    if not model.is_packed:
        pack_model(model.loaded.model, config.kernel)
    if failing := prove(model).failing:
        raise RunError(f"{failing[0]} does not take {model.bits} values. Nothing is saved.")
    if model.origin is None:
        cell = Cell.of(config)
        model.origin = describe_origin(
            cell, model.loaded, model.method, model.expected, model.quantized
        )
    save_packed_model(model.loaded, Path(folder), model.origin)


def _quoted(path: str | Path) -> str:
    """A path as Hydra's grammar takes it."""
    escaped = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
