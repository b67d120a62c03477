"""What a run can be told, as dataclasses: the schema that Hydra holds every YAML and override to.

One dataclass per config group; `RunConfig` is the whole. Hydra checks keys and types while it
composes; `__post_init__` checks values as soon as a `RunConfig` exists, whoever made it; and
`from_hydra` closes the door that Hydra leaves open, a key added with `+`. The nodes `method` and
`launcher` are open, because what they name has parameters of its own: `qvlm.prepare` and
`qvlm.launchers` hold them to what their `_target_` takes.

Imports nothing heavy, so that a mistyped option is answered at once.
"""

from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from qvlm.errors import UserError

CONF = Path(__file__).resolve().parents[2] / "conf"

HERE = {"_target_": "qvlm.sweep.launchers.Here"}
FULL_PRECISION = {"_target_": "qvlm.methods.full_precision.FullPrecision"}
MAP = "map"  # the device that is all devices


def _one_of(key: str, value: object, accepted: Collection[str]) -> None:
    if value not in accepted:
        raise UserError(f"{key}: {value!r} is unknown; accepted are {', '.join(accepted)}")


def _within(key: str, value: float | None, low: float, high: float | None = None) -> None:
    if value is None or not (value >= low and (high is None or value <= high)):
        accepted = f"from {low:g} to {high:g}" if high is not None else f"of at least {low:g}"
        raise UserError(f"{key}: {value} is not accepted; give a number {accepted}")


@dataclass
class ModelConfig:
    """A checkpoint and what it was tuned with.

    Attributes:
        name: in records and tables.
        path: a folder, the name of an embedded miniature, or a repository of the hub.
        stands_for: the model of the paper whose numbers tables show beside this one's.
        vision_tower: folder or repository of the tower, where the checkpoint only names one; null
            is the one that it names.
        image_size: side of the tower's input in pixels, held against the checkpoint; null is
            whatever that says.
        image_fit: how a picture becomes square, "crop" or "pad"; null is what the checkpoint says.
        expert_capacity: "checkpoint" drops the tokens that an expert has no place for, as the
            checkpoint states; "unlimited" drops none.
        weight_group_size: weights that share a scale, where the quantizer groups them.
        packed: a folder that `save_packed` wrote: it is evaluated as it is, and brings method,
            bits, quantizer and calibration with it.
    """

    name: str = MISSING
    path: str = MISSING
    stands_for: str | None = None
    prompt_format: str = "QCM-LEA"
    conversation: str = "vicuna_v1"
    vision_tower: str | None = None
    image_size: int | None = None
    image_fit: str | None = None
    expert_capacity: str = "checkpoint"
    dtype: str = "float32"
    weight_group_size: int = 128
    packed: str | None = None

    def __post_init__(self) -> None:
        if self.image_size is not None:
            _within("model.image_size", self.image_size, 1)
        if self.image_fit is not None:
            _one_of("model.image_fit", self.image_fit, ("crop", "pad"))
        _one_of("model.expert_capacity", self.expert_capacity, ("checkpoint", "unlimited"))
        _one_of("model.dtype", self.dtype, ("float32", "bfloat16", "float16"))
        _within("model.weight_group_size", self.weight_group_size, 1)


@dataclass
class BitsConfig:
    """Bits per weight and per activation; both null is full precision."""

    weights: int | None = None
    activations: int | None = None

    def __post_init__(self) -> None:
        if (self.weights is None) != (self.activations is None):
            raise UserError(
                "bits.weights and bits.activations are both null (full precision) or both from "
                f"2 to 8; got {self.weights} and {self.activations}"
            )
        if self.weights is not None:
            _within("bits.weights", self.weights, 2, 8)
            _within("bits.activations", self.activations, 2, 8)

    @property
    def label(self) -> str:
        """As tables print it: "FP", "W4A4"."""
        return "FP" if self.weights is None else f"W{self.weights}A{self.activations}"


@dataclass
class GranularityConfig:
    """Which elements share a scale; `qvlm.quantization.QuantSpec` says what there is."""

    granularity: str = MISSING
    group_size: int = 128


@dataclass
class QuantizerConfig:
    """The quantizer that every method shares.

    Attributes:
        weight: of every quantized linear layer.
        language: activations of projector and language model.
        vision: activations of the vision tower.
        vision_tower: whether the vision tower is quantized at all.
        ranges: "lp", clipped to the least lp distance, or "minmax".
        p: the exponent of that distance.
    """

    weight: GranularityConfig = field(default_factory=GranularityConfig)
    language: GranularityConfig = field(default_factory=GranularityConfig)
    vision: GranularityConfig = field(default_factory=GranularityConfig)
    vision_tower: bool = True
    ranges: str = "lp"
    p: float = 2


@dataclass
class DataConfig:
    """Problems in ScienceQA's schema.

    Attributes:
        name: what records call the data.
        source: "miniature", which is generated, a folder, or a data set of the hub.
        split: the one that is evaluated.
        published: the source is the whole published ScienceQA, and has its class sizes.
        seed: of the generator; apart from the run's seed, so that a new seed meets the same
            questions and two runs can be compared question by question.
    """

    name: str = MISSING
    source: str = MISSING
    split: str = "test"
    published: bool = False
    seed: int = 0


@dataclass
class CalibrationConfig:
    """The problems, with their answers, from which activation ranges are taken.

    Attributes:
        images: "only" draws problems with a picture, the image-text pairs of the paper; "any" draws
            from all.
    """

    split: str = "train"
    samples: int = 64
    images: str = "only"
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("calibration.images", self.images, ("only", "any"))
        _within("calibration.samples", self.samples, 1)
        _within("calibration.batch_size", self.batch_size, 1)


@dataclass
class EvaluationConfig:
    """How answers are generated and scored.

    Attributes:
        temperature: 0 is greedy; above, tokens are sampled.
        unparsable: an answer without a letter is "wrong", or "random" as the official script has
            it, which lifts a broken model by 20 to 50 points.
        limit: evaluate only so many questions; null is all of them. A streamed cell may have 0: it
            ends once the packed model is written.
    """

    batch_size: int = 128
    max_new_tokens: int = 64
    unparsable: str = "wrong"
    temperature: float = 0.0
    limit: int | None = None

    def __post_init__(self) -> None:
        _within("evaluation.batch_size", self.batch_size, 1)
        _within("evaluation.temperature", self.temperature, 0)
        _within("evaluation.max_new_tokens", self.max_new_tokens, 1)
        _one_of("evaluation.unparsable", self.unparsable, ("wrong", "random"))


@dataclass
class TrackingConfig:
    """Weights & Biases: "offline" needs no account and no network, "off" writes nothing."""

    mode: str = "offline"
    project: str = "qvlm"
    entity: str | None = None
    dir: str = MISSING
    examples: int = 8

    def __post_init__(self) -> None:
        _one_of("tracking.mode", self.mode, ("offline", "online", "off"))
        _within("tracking.examples", self.examples, 0)


@dataclass
class ScaleConfig:
    """The models that each experiment sweeps over, separated by commas."""

    table1: str = MISSING
    table2: str = MISSING
    table5: str = MISSING


@dataclass
class RunConfig:
    """One cell: one model, quantized by one method to one bit width, evaluated on one data set.

    Attributes:
        method: `_target_` and its parameters.
        launcher: `_target_` of what runs the cells of a sweep, see `qvlm.launchers`, and its
            options.
        method_name: the name of the method's YAML; names the record's folder.
        execution: "simulated" multiplies rounded numbers in floating point; "exact" does so in
            float64 during the evaluation, so that only outputs are rounded; "packed" keeps codes
            and multiplies them with the products of `qvlm.packing`.
        kernel: Packed product to force, a name from `qvlm.packing.kernels.KERNELS`; "auto" lets
            each layer choose.
        save_packed: a folder to write the packed model to; its execution is packed.
        stream: have only one decoder layer in memory while quantizing, and write it to
            `save_packed` before the next is read; for models larger than memory.
        group: cells that belong together, in Weights & Biases.
        device: "auto" is the first GPU, or the CPU where there is none; "map" spreads a model that
            is too large for one card over all of them and main memory.
        max_memory: of device=map, the most that each card, in order, and then main memory may hold
            of the model, such as "20GiB"; where it ends early, most of what is free.
        threads: of PyTorch on the CPU; null leaves its choice.
        force: compute even if a complete record exists.
        preflight: say what the cell will read, need and take, and stop.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    method: dict[str, Any] = field(default_factory=dict)
    bits: BitsConfig = field(default_factory=BitsConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    launcher: dict[str, Any] = field(default_factory=lambda: dict(HERE))
    seed: int = 0
    execution: str = "simulated"
    kernel: str = "auto"
    save_packed: str | None = None
    stream: bool = False
    results_dir: str = "results"
    device: str = "auto"
    max_memory: list[str] = field(default_factory=list)
    threads: int | None = None
    force: bool = False
    preflight: bool = False
    group: str = "cells"
    method_name: str = MISSING

    def __post_init__(self) -> None:
        if not isinstance(self.method.get("_target_"), str):
            raise UserError("method._target_: give the import path of a class, pkg.module.Class")
        if self.threads is not None:
            _within("threads", self.threads, 1)
        _one_of("execution", self.execution, ("simulated", "exact", "packed"))
        if self.kernel != "auto":
            from qvlm.packing.kernels import names  # imports PyTorch

            _one_of("kernel", self.kernel, names())
        if self.max_memory and self.device != MAP:
            raise UserError("max_memory: it limits device=map; accepted without that is []")
        if self.kernel != "auto" and not self.packed:
            raise UserError(f"kernel: {self.kernel!r} needs execution=packed")
        if self.execution == "exact" and self.packed:
            raise UserError(
                "execution: 'exact' is simulated, and save_packed and model.packed are not: "
                "accepted with them is packed"
            )
        streams = self.stream and not self.full_precision
        if streams and self.model.packed is None and self.save_packed is None:
            raise UserError("stream: give save_packed=FOLDER, where the packed model is written to")
        if streams and self.device == MAP:
            raise UserError(
                "stream: device=map is not accepted, because one decoder layer at a time needs one "
                "device; stream with device=auto, and evaluate with device=map model.packed=FOLDER"
            )
        if self.evaluation.limit is not None:
            _within("evaluation.limit", self.evaluation.limit, 0 if streams else 1)

    @property
    def packed(self) -> bool:
        """Whether codes are multiplied, and not their values."""
        wanted = self.execution == "packed" or self.save_packed or self.model.packed
        return bool(wanted) and not self.full_precision

    @property
    def runs_dir(self) -> Path:
        """Where the records are."""
        return Path(self.results_dir) / "runs"

    @property
    def full_precision(self) -> bool:
        """Whether nothing is quantized: bits=fp with any method is the same cell as method=fp."""
        return self.bits.weights is None or self.method == FULL_PRECISION

    @property
    def only_written(self) -> bool:
        """Whether a stream is to leave a packed model and nothing else: there is no record."""
        return self.evaluation.limit == 0


def canonical(config: RunConfig) -> RunConfig:
    """The same cell under its one name: full precision has no bits and no other method."""
    if not config.full_precision:
        return replace(config, execution="packed" if config.packed else config.execution)
    return replace(
        config,
        method=dict(FULL_PRECISION),
        method_name="fp",
        bits=BitsConfig(),
        execution="simulated",
        save_packed=None,
        stream=False,
    )


def influences(config: RunConfig) -> dict[str, Any]:
    """The part of a configuration that changes a number: what a record is identified by.

    The content of the checkpoint counts as well and is hashed beside it (`qvlm.prepare`). Where the
    work happens (device, threads), where it is written and how it is shown do not count. Full
    precision does not depend on quantizer and calibration, and only packed execution on the kernel.
    Nor is simulated execution named, which is what there was before there was another.
    """
    config = canonical(config)
    parts = ["model", "method", "bits", "data", "evaluation", "seed"]
    if not config.full_precision:
        parts += ["quantizer", "calibration"]
    if config.execution != "simulated":
        parts.append("execution")
    if config.packed:
        parts.append("kernel")
    whole = asdict(config)
    for place in ("path", "packed", "vision_tower", "stands_for"):
        del whole["model"][place]
    return {part: whole[part] for part in parts}


def from_hydra(composed: DictConfig) -> RunConfig:
    """The typed configuration of a composed one.

    Raises:
        UserError: for a key that is not in the schema, a missing one, or a value that is refused.
        OmegaConfBaseException: for a value of a wrong type or an interpolation that leads nowhere.
    """
    schema = OmegaConf.structured(RunConfig)
    _compare_keys(composed, schema, "")
    for key in sorted(OmegaConf.missing_keys(composed)):
        if not key.startswith("hydra."):
            raise UserError(f"{key} is missing; give {key}=VALUE")
    container = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(container, dict)
    container.pop("hydra", None)
    config = OmegaConf.to_object(OmegaConf.merge(schema, container))
    assert isinstance(config, RunConfig)
    return config


def _compare_keys(given: DictConfig, schema: DictConfig, prefix: str) -> None:
    """Refuses keys that were added with `+` or deleted with `~`, here and in the nodes below."""
    accepted = [str(key) for key in schema.keys()]  # noqa: SIM118
    present = [str(key) for key in given.keys()]  # noqa: SIM118 - `in` skips missing values
    for key in present:
        if key not in accepted and f"{prefix}{key}" != "hydra":
            raise UserError(
                f"unknown key {prefix}{key}; accepted are {', '.join(sorted(accepted))}"
            )
    for key in accepted:
        if key not in present:
            raise UserError(f"{prefix}{key} cannot be deleted; give it a value")
        inner = schema._get_node(key)
        if isinstance(inner, DictConfig) and OmegaConf.get_type(inner) is not dict:
            below = given._get_node(key)
            if not isinstance(below, DictConfig) or below._is_none():
                raise UserError(f"{prefix}{key} cannot be null; give it a value")
            _compare_keys(below, inner, f"{prefix}{key}.")


def register() -> None:
    """Makes the schema known to Hydra, and what `-m` does (`hydra_plugins`)."""
    store = ConfigStore.instance()
    schema = OmegaConf.structured(RunConfig)
    OmegaConf.set_struct(schema.method, False)  # a method's parameters are its own affair
    OmegaConf.set_struct(schema.launcher, False)
    store.store(name="schema", node=schema)
    sweeper = {
        "_target_": "hydra_plugins.qvlm_sweeper.CellSweeper",
        "max_batch_size": None,
        "params": None,
    }
    store.store(group="hydra/sweeper", name="cells", node=sweeper)
    launcher = {"_target_": "hydra_plugins.qvlm_launcher.CellLauncher"}
    store.store(group="hydra/launcher", name="cells", node=launcher)
