"""Every option of a cell, as dataclasses. Hydra holds each YAML file and override to them.

There is one dataclass per config group, and `RunConfig` is the whole. Hydra checks keys and types
while it composes (`qvlm.config.compose`), and `__post_init__` checks values as soon as an object is
made, whoever makes it. The nodes `method` and `launcher` are open, because what their `_target_`
names has parameters of its own. `qvlm.cell.inputs` and `qvlm.sweep.launch` check those.

This module imports neither PyTorch nor Hydra, so that a mistyped option is answered at once.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from qvlm.bits import BitWidths
from qvlm.errors import UserError
from qvlm.validation import check_name, one_of, refused, seed, whole_number

DEFAULT_LAUNCHER = {"_target_": "qvlm.sweep.local.Auto"}
FULL_PRECISION_METHOD = {"_target_": "qvlm.methods.full_precision.FullPrecision"}
MAP = "map"  # the value of `device` that stands for all devices
SCORING = ("generate", "rank")  # how an answer to a problem is found
UNPARSABLE = ("wrong", "random")  # what an answer without a letter counts as
# Options that name a folder or file of the user, whose "~" is expanded (`qvlm.config.compose`).
PATHS = (
    *("model.path", "model.packed", "model.vision_tower", "data.source"),
    *("results_dir", "save_packed", "tracking.dir", "tasks.include_path", "tasks.folder"),
    "committed",
)
MOST_THREADS = 1024  # PyTorch crashes where the system refuses to make more
MOST_TOKENS = 2**16  # of an answer, which is more than any model of the paper can attend to
TEMPERATURES = 0.001, 1000.0  # within which logits stay finite in every floating-point type


@dataclass
class ModelConfig:
    """A checkpoint and the prompt that it was tuned with.

    Attributes:
        name: Name in records and tables.
        path: Folder, name of an embedded miniature, or repository on the Hugging Face Hub.
        made_by: Command that makes the folder of `path`, if neither the package nor the Hub has it.
        stands_for: Model of the paper whose numbers tables print beside this model's.
        prompt_format: Parts of prompt and answer, in ScienceQA's notation; see `qvlm.data.prompts`.
        conversation: Name of the conversation template.
        vision_tower: Folder or repository of the vision tower, for a checkpoint that only names
            its tower. Null stands for the tower that the checkpoint names.
        image_size: Side of the tower's input in pixels, which must agree with the checkpoint. Null
            stands for the checkpoint's value.
        image_fit: How an image becomes square, "crop" or "pad". Null stands for the checkpoint's
            value.
        expert_capacity: "checkpoint" drops the tokens that exceed an expert's capacity, as the
            checkpoint states. "unlimited" drops none.
        dtype: Floating-point type of the weights.
        weight_group_size: Number of weights of projector and language model that share a scale, if
            the quantizer groups them. Null is the largest divisor of a layer's input up to 128, or
            all of it if it has none from 16 on.
        vision_weight_group_size: The same for the vision tower.
        packed: Folder that `save_packed` wrote. Its model is evaluated as it is, and method, bits,
            quantizer and calibration are those that it was made with.
    """

    name: str = MISSING
    path: str = MISSING
    made_by: str | None = None
    stands_for: str | None = None
    prompt_format: str = "QCM-LEA"
    conversation: str = "vicuna_v1"
    vision_tower: str | None = None
    image_size: int | None = None
    image_fit: str | None = None
    expert_capacity: str = "checkpoint"
    dtype: str = "float32"
    weight_group_size: int | None = None
    vision_weight_group_size: int | None = None
    packed: str | None = None

    def __post_init__(self) -> None:
        if self.image_size is not None:
            whole_number("model.image_size", self.image_size)
        if self.image_fit is not None:
            one_of("model.image_fit", self.image_fit, ("crop", "pad"))
        one_of("model.expert_capacity", self.expert_capacity, ("checkpoint", "unlimited"))
        one_of("model.dtype", self.dtype, ("float64", "float32", "bfloat16", "float16"))
        for option in ("weight_group_size", "vision_weight_group_size"):
            if getattr(self, option) is not None:
                whole_number(f"model.{option}", getattr(self, option))


@dataclass
class GranularityConfig:
    """Which elements share a scale.

    Attributes:
        granularity: One of the granularities of `qvlm.quantization.QuantSpec`.
        group_size: Number of elements that share a scale, if the granularity forms groups. Null is
            the largest divisor of a layer's input up to 128, or all of it if it has none from 16
            on.
    """

    granularity: str = MISSING
    group_size: int | None = None


@dataclass
class QuantizerConfig:
    """The quantizer that every method starts from.

    Attributes:
        weight: Granularity of the weights of projector and language model.
        vision_weight: Granularity of the weights of the vision tower.
        language: Granularity of the activations of projector and language model.
        vision: Granularity of the activations of the vision tower.
        vision_tower: Whether the vision tower is quantized.
        ranges: Range estimator: "lp" clips to the smallest lp distance, "minmax" does not clip.
        p: Exponent of that distance.
        static_width: Only with `per_channel_prompt`, the number of features of the inputs that have
            static scales nevertheless. Null is none.
        first_token: "quantized", or "float" to leave the activations of the first position in
            floating point in every linear of the decoder.
    """

    weight: GranularityConfig = field(default_factory=GranularityConfig)
    vision_weight: GranularityConfig = field(default_factory=GranularityConfig)
    language: GranularityConfig = field(default_factory=GranularityConfig)
    vision: GranularityConfig = field(default_factory=GranularityConfig)
    vision_tower: bool = True
    ranges: str = "lp"
    p: float = 2
    static_width: int | None = None
    first_token: str = "quantized"


@dataclass
class DataConfig:
    """Problems in ScienceQA's schema, or plain text.

    Attributes:
        name: Name in records.
        kind: "problems", which are answered, or "text", whose tokens are predicted.
        source: For problems "miniature" for generated ones, a folder, or a data set of the Hub. For
            text "text" for that of the package, or a folder with files *.txt.
        split: Name of the split that is evaluated.
        published: Whether the source is the whole published ScienceQA, whose class sizes are then
            required.
        seed: Seed of the generator. It is apart from the run's seed, so that runs with different
            seeds answer the same questions and can be compared question by question.
    """

    name: str = MISSING
    source: str = MISSING
    split: str = "test"
    published: bool = False
    seed: int = 0
    kind: str = "problems"

    def __post_init__(self) -> None:
        one_of("data.kind", self.kind, ("problems", "text"))
        seed("data.seed", self.seed)


@dataclass
class CalibrationConfig:
    """The problems, with their answers, that activation ranges are estimated on.

    Attributes:
        split: Name of the split that they are drawn from.
        samples: Number of problems.
        images: "only" draws problems with an image, the image-text pairs of the paper. "any" draws
            from all problems, and "none" from those without an image.
        batch_size: Number of problems per batch.
        seed: Seed of the draw.
        tokens: Number of tokens of each sample, where the data are text.
    """

    split: str = "train"
    samples: int = 64
    images: str = "only"
    batch_size: int = 8
    seed: int = 0
    tokens: int = 256

    def __post_init__(self) -> None:
        one_of("calibration.images", self.images, ("only", "any", "none"))
        whole_number("calibration.tokens", self.tokens, 2)
        whole_number("calibration.samples", self.samples)
        whole_number("calibration.batch_size", self.batch_size)
        seed("calibration.seed", self.seed)


@dataclass
class EvaluationConfig:
    """How answers are generated and scored.

    Attributes:
        batch_size: Number of questions per batch.
        scoring: "generate" lets the model write an answer. "rank" takes the choice whose letter it
            finds most likely as the answer itself, without reasons before it.
        max_new_tokens: Number of tokens after which an answer is cut off. Null stands for what the
            model's prompt format needs; see `qvlm.cell.inputs.answer_length`.
        unparsable: What an answer without a letter counts as: "wrong", or a "random" choice, the
            rule of the official script, which lifts a broken model by 20 to 50 points.
        temperature: Sampling temperature from 0.001 to 1000. 0 decodes greedily.
        limit: Number of questions, or of documents, to evaluate. Null stands for all of them.
        window: Largest number of tokens that are read at once, where the data are text.
        kl_problems: Number of questions, the first ones, on whose expected answers a quantized
            model is compared with full precision, token by token. 0 compares none. Null stands for
            1,024 with an embedded miniature and 128 with any other model, which takes a few percent
            of the evaluation's time; see `qvlm.cell.inputs.compared_problems`.
    """

    batch_size: int = 128
    scoring: str = "generate"
    max_new_tokens: int | None = None
    unparsable: str = "wrong"
    temperature: float = 0.0
    limit: int | None = None
    window: int = 2048
    kl_problems: int | None = None

    def __post_init__(self) -> None:
        whole_number("evaluation.batch_size", self.batch_size)
        whole_number("evaluation.window", self.window, 2)
        if self.kl_problems is not None:
            whole_number("evaluation.kl_problems", self.kl_problems, 0)
        coldest, hottest = TEMPERATURES
        if self.temperature != 0 and not coldest <= self.temperature <= hottest:
            raise refused(
                "evaluation.temperature",
                self.temperature,
                f"0 (greedy decoding) or a number from {coldest:g} to {hottest:g}",
            )
        if self.max_new_tokens is not None:
            whole_number("evaluation.max_new_tokens", self.max_new_tokens, 1, MOST_TOKENS)
        one_of("evaluation.scoring", self.scoring, SCORING)
        one_of("evaluation.unparsable", self.unparsable, UNPARSABLE)
        if self.limit == 0:
            raise UserError(
                "evaluation.limit=0 is not a number of questions. To write the packed model and "
                "stop, give evaluate=false."
            )
        if self.limit is not None:
            whole_number("evaluation.limit", self.limit)


@dataclass
class TasksConfig:
    """Tasks of lm-eval. They take the place of the data, which are calibrated on all the same.

    Of `evaluation` only `batch_size`, `max_new_tokens`, `temperature` and `limit` concern them.

    Attributes:
        names: Names of tasks, groups or tags. None evaluates on the data.
        include_path: Folder with tasks of the user: YAML files, and what they read.
        folder: Folder with the data of qvlm's own tasks; see `qvlm.evaluation.vqa.questions`.
        num_fewshot: Number of examples in each prompt. Null stands for what each task says.
        chat_template: Whether prompts are put into the conversation template of the model.
    """

    names: list[str] = field(default_factory=list)
    include_path: str | None = None
    folder: str | None = None
    num_fewshot: int | None = None
    chat_template: bool = False

    def __post_init__(self) -> None:
        if self.num_fewshot is not None:
            whole_number("tasks.num_fewshot", self.num_fewshot, 0)


@dataclass
class TrackingConfig:
    """Weights & Biases.

    Attributes:
        mode: "offline" needs neither account nor network, "online" needs both, and "off" writes
            nothing.
        project: Name of the project.
        entity: Name of the account or team. Null stands for the account's default.
        dir: Folder that offline runs are written to.
        examples: Number of questions that are shown with their images and answers.
    """

    mode: str = "offline"
    project: str = "qvlm"
    entity: str | None = None
    dir: str = MISSING
    examples: int = 8

    def __post_init__(self) -> None:
        one_of("tracking.mode", self.mode, ("offline", "online", "off"))
        whole_number("tracking.examples", self.examples, 0)


@dataclass
class ScaleConfig:
    """The models that each experiment sweeps over, separated by commas."""

    table1: str = MISSING
    table2: str = MISSING
    table5: str = MISSING
    table6: str = MISSING


@dataclass
class RunConfig:
    """One cell: one model, quantized by one method to one bit width, evaluated on one data set.

    Attributes:
        method: `_target_`, the import path of the method's class, and its parameters.
        launcher: `_target_`, the import path of a class of `qvlm.sweep`, and its options.
        seed: Seed of every random number generator.
        execution: "simulated" multiplies dequantized numbers in the model's floating-point type,
            which is float64 for the embedded models. "exact" does so in float64 during the
            evaluation of any other model, so that only outputs are rounded. "packed" keeps codes
            and multiplies them with the kernels of `qvlm.packing`.
        kernel: Kernel of packed execution, one of `qvlm.packing.KERNELS`. With "auto" each layer
            chooses its own.
        save_packed: Folder to write the packed model to. Execution is then packed.
        stream: Whether to quantize with only one decoder layer in memory, each being written to
            `save_packed` before the next is read. For models larger than memory.
        evaluate: Whether to evaluate the model. If false, the cell ends once the packed model is
            written, and there is no record.
        results_dir: Folder of records, tables and tracking.
        device: "auto" is the first GPU, or the CPU if there is none. "map" spreads a model that is
            too large for one GPU over all GPUs and main memory.
        max_memory: Most memory that device=map may use of each GPU, in order, and then of main
            memory, such as "20GiB". A device that is not listed may use most of what it has free.
        threads: Number of PyTorch's CPU threads. Null leaves the number to PyTorch.
        force: Whether to compute a cell that is recorded already.
        committed: Folder of committed answers, such as results/answers/claims. A sweep leaves out
            the cells whose answers it holds, in whichever version of the code.
        preflight: Whether to print what cells will read, need and take, and stop.
        group: Name of the sweep in Weights & Biases. A sweep that is left with the default is named
            after its options.
        method_name: Name of the method's YAML file, which is part of the record's folder name.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    method: dict[str, Any] = field(default_factory=dict)
    bits: BitWidths = field(default_factory=BitWidths)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tasks: TasksConfig = field(default_factory=TasksConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    launcher: dict[str, Any] = field(default_factory=lambda: dict(DEFAULT_LAUNCHER))
    seed: int = 0
    execution: str = "simulated"
    kernel: str = "auto"
    save_packed: str | None = None
    stream: bool = False
    evaluate: bool = True
    results_dir: str = "results"
    device: str = "auto"
    max_memory: list[str] = field(default_factory=list)
    threads: int | None = None
    force: bool = False
    committed: str | None = None
    preflight: bool = False
    group: str = "cells"
    method_name: str = MISSING

    def __post_init__(self) -> None:
        if not isinstance(self.method.get("_target_"), str):
            raise UserError("method._target_ is not an import path. Give package.module.Class.")
        names = (
            *(("model.name", self.model.name), ("data.name", self.data.name)),
            *(("method_name", self.method_name), ("group", self.group)),
        )
        for option, name in names:
            check_name(option, name)
        seed("seed", self.seed)
        if self.threads is not None:
            whole_number("threads", self.threads, 1, MOST_THREADS)
        one_of("execution", self.execution, ("simulated", "exact", "packed"))
        if self.max_memory and self.device != MAP:
            raise UserError("max_memory is not for one device. Give device=map, or max_memory=[].")
        if self.kernel != "auto" and not self.packed:
            raise UserError(
                f"kernel={self.kernel} is not for simulated execution. Give execution=packed."
            )
        if self.execution == "exact" and self.packed:
            raise UserError(
                "execution=exact is not for packed models, which save_packed and model.packed "
                "stand for. Give execution=packed."
            )
        if not self.evaluate and (self.save_packed is None or self.full_precision):
            raise UserError(
                "evaluate=false is not possible if no packed model is written. Give "
                "save_packed=FOLDER and a method that quantizes."
            )
        if self.stream and not self.full_precision:
            self._check_stream()

    def _check_stream(self) -> None:
        if self.model.packed is None and self.save_packed is None:
            raise UserError(
                "stream=true is not possible without a folder for the packed model. Give "
                "save_packed=FOLDER."
            )
        if self.device == MAP:
            raise UserError(
                "stream=true is not possible with device=map, because the one decoder layer in "
                "memory needs one device. Stream with device=auto, and evaluate with device=map "
                "model.packed=FOLDER."
            )

    @property
    def packed(self) -> bool:
        """Whether codes are multiplied, rather than the numbers that they stand for."""
        wanted = self.execution == "packed" or self.save_packed or self.model.packed
        return bool(wanted) and not self.full_precision

    @property
    def packed_source(self) -> str | None:
        """The packed checkpoint that is evaluated, or None if the model is quantized in memory.

        A streamed cell writes it first; other cells are given one as `model.packed`.
        """
        return self.model.packed or (self.save_packed if self.stream else None)

    @property
    def on_text(self) -> bool:
        """Whether the data are plain text, and not problems. Tasks may take their place."""
        return self.data.kind == "text"

    @property
    def runs_dir(self) -> Path:
        """The folder of the records."""
        return Path(self.results_dir) / "runs"

    @property
    def full_precision(self) -> bool:
        """Whether nothing is quantized: bits=fp with any method is the same cell as method=fp."""
        return self.bits.is_full_precision or self.method == FULL_PRECISION_METHOD

    @property
    def title(self) -> str:
        """Model, method and bit widths, as messages name a cell."""
        return f"{self.model.name}, {self.method_name}, {self.bits.label}"


def canonical(config: RunConfig) -> RunConfig:
    """The same cell in its one form.

    Full precision has no bit widths and no other method. In a model in float64, simulated execution
    is exact.
    """
    if not config.full_precision:
        execution = "packed" if config.packed else config.execution
        if execution == "exact" and config.model.dtype == "float64":
            execution = "simulated"
        return replace(config, execution=execution)
    return replace(
        config,
        method=dict(FULL_PRECISION_METHOD),
        method_name="fp",
        bits=BitWidths(),
        execution="simulated",
        save_packed=None,
        stream=False,
    )


def influences(config: RunConfig) -> dict[str, Any]:
    """The part of a canonical configuration that can change a number.

    It identifies a record together with the code version and the hashes of the files that the cell
    reads. Paths are therefore no part of it, nor are the options that say where the work happens
    (device, threads), where it is written, and how it is shown. Full precision does not depend on
    quantizer, calibration and execution. Only packed execution depends on the kernel. Generated
    answers are not named as such, as in records that are older than ranked ones.
    """
    parts = ["model", "method", "bits", "data", "evaluation", "seed"]
    if not config.full_precision:
        parts += ["quantizer", "calibration", "execution"]
    if config.packed:
        parts.append("kernel")
    if config.tasks.names:
        parts.append("tasks")
    whole = asdict(config)
    for path in ("include_path", "folder"):
        del whole["tasks"][path]
    if config.evaluation.scoring == "generate":
        del whole["evaluation"]["scoring"]
    for path in ("path", "made_by", "packed", "vision_tower", "stands_for"):
        del whole["model"][path]
    return {part: whole[part] for part in parts}
