"""A model that is streamed layer by layer: the same checkpoint, killed or not, in little memory."""

import ctypes
import importlib.util
import json
import multiprocessing
import os
import resource
import signal
import sys
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig

from qvlm.cell import inputs
from qvlm.cell.identity import Cell
from qvlm.cell.method import build_method
from qvlm.cell.streaming import stream_cell
from qvlm.cli import main
from qvlm.config.schema import RunConfig
from qvlm.data import miniature
from qvlm.data.scienceqa import COLUMNS
from qvlm.data.sources import Split
from qvlm.errors import RunError, UserError
from qvlm.methods.base import MethodReport
from qvlm.models.packed import save_packed_model
from qvlm.packing import PackedLinear, pack_model, read_origin
from qvlm.packing.partial import PartialCheckpoint
from qvlm.packing.saving import PROGRESS
from qvlm.packing.simulated import simulated
from qvlm.quantization import (
    QuantLinear,
    QuantSpec,
    Walk,
    batch_by_length,
    weight_quantizer,
)
from qvlm.quantization.normal_float import NormalFloatQuantizer
from qvlm.quantization.quantizer import Quantizer, TokenQuantizer, UniformQuantizer
from qvlm.records.files import PARTIAL
from qvlm.runtime.stages import Stages
from tests.helpers.cells import run
from tests.helpers.configs import load
from tests.helpers.files import small_files
from tests.helpers.origins import make_origin
from tests.helpers.splits import split_of
from tests.helpers.standins import write

pytestmark = pytest.mark.instruction_set

FOLDER = Path(__file__).resolve().parents[2] / "experiments"
SPEC = importlib.util.spec_from_file_location("streaming_experiment", FOLDER / "streaming.py")
assert SPEC is not None
assert SPEC.loader is not None
experiment = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(experiment)

FEW = ["calibration.samples=3", "calibration.split=test", "calibration.images=any", "threads=1"]
FEW += ["tracking=off", "evaluation.limit=4", "bits=w4a4"]
PROBLEMS: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def few_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    """Problems are generated once, and few."""
    monkeypatch.setattr(inputs, "load_scienceqa", problems)
    monkeypatch.setattr(inputs, "open_scienceqa", opened)


def problems(
    source: str, split: str, limit: int | None, seed: int, with_images: bool = True
) -> Any:
    if "rows" not in PROBLEMS:
        rows = miniature.generate("test", 8, seed=0)
        PROBLEMS["rows"] = Dataset.from_list(rows, features=COLUMNS)
    return PROBLEMS["rows"] if limit is None else PROBLEMS["rows"].select(range(limit))


def opened(source: str, split: str, seed: int) -> Split:
    return split_of(problems(source, split, None, seed), split)


def streamed(folder: Path, *overrides: str) -> RunConfig:
    """The configuration of a streamed cell."""
    words = [*FEW, "stream=true", f"save_packed={folder}", f"results_dir={folder.parent}/results"]
    config = load(*words, *overrides)
    assert isinstance(config, RunConfig)
    return config


def write_stream(config: RunConfig) -> None:
    method = build_method(config.method)
    with Stages("test", 2) as stages:
        stream_cell(unidentified(config), method, "cpu", stages)


def unidentified(config: RunConfig) -> Cell:
    """A cell whose hash is not that of what it depends on."""
    return Cell(config, "it", {}, "", {})


def write_in_memory(config: RunConfig, folder: Path) -> None:
    """The ordinary way: everything in memory, packed at the end."""
    loaded = inputs.load(replace(config, stream=False), "cpu")
    samples, _ = inputs.draw_calibration(config)
    batches = batch_by_length(loaded, samples, config.calibration.batch_size)
    walk = Walk(loaded.model, batches, inputs.quantization_config(config))
    build_method(config.method).quantize(walk)
    pack_model(loaded.model)
    save_packed_model(loaded, folder, make_origin())


def tensors(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_same(folder: Path, other: Path) -> None:
    """Equal names, types and bits, and equal files beside the shards."""
    own, theirs = tensors(folder), tensors(other)
    assert own.keys() == theirs.keys()
    for name, tensor in own.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name
    for file in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (folder / file).read_text() == (other / file).read_text()


@pytest.mark.parametrize("method", ["rtn", "awq", "layerwise", "qvlm_cdm", "qlora", "zeroquant"])
@pytest.mark.parametrize("model", ["mini_llava", "mini_moe_llava"])
def test_a_stream_writes_what_memory_would(model: str, method: str, tmp_path: Path) -> None:
    words = ["method.n_grid=3", "method.max_shrink=0.1"] if method == "awq" else []
    words += ["method.percentiles=[1.0,0.99]"] if method in ("layerwise", "qvlm_cdm") else []
    words += ["method.mining_tokens=64"] if method == "qvlm_cdm" else []
    config = streamed(tmp_path / "stream", f"model={model}", f"method={method}", *words)
    write_stream(config)
    write_in_memory(config, tmp_path / "memory")
    assert_same(tmp_path / "stream", tmp_path / "memory")
    assert len(list((tmp_path / "stream").glob("*.safetensors"))) == 1 + 4 + 1 + 4
    assert not (tmp_path / "stream" / PROGRESS).exists()


def test_a_rotated_model_is_streamed(tmp_path: Path) -> None:
    """Layers are rotated as they are read, between ends that were rotated before."""
    words = ["model=mini_moe_llava", "method=quarot", "quantizer.vision_tower=false"]
    config = streamed(tmp_path / "stream", *words)
    write_stream(config)
    write_in_memory(config, tmp_path / "memory")
    assert_same(tmp_path / "stream", tmp_path / "memory")
    written = json.loads((tmp_path / "stream" / "config.json").read_text())
    assert written["head_bias"] and written["text_config"]["router_bias"]
    assert "lm_head.bias" in tensors(tmp_path / "stream")
    run(load(*FEW, f"model.packed={tmp_path}/stream", f"results_dir={tmp_path}/results"))


@pytest.mark.parametrize("family", ["llava", "llava_v15", "moe_llava", "hub"])
def test_original_are_streamed(family: str, tmp_path: Path) -> None:
    standin = write(family, tmp_path, safetensors=family == "hub")
    words = [f"model.path={standin.folder}", "model.dtype=bfloat16", "model.weight_group_size=8"]
    words += [f"model.vision_tower={standin.tower}"] if standin.tower else []
    words += ["model=moe_llava"] if family == "moe_llava" else ["model=llava_7b"]
    words += ["model.image_size=null", "quantizer.vision_tower=false"]
    config = streamed(tmp_path / "stream", *words)
    write_stream(config)
    write_in_memory(config, tmp_path / "memory")
    assert_same(tmp_path / "stream", tmp_path / "memory")


def test_a_streamed_cell_is_evaluated_and_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = streamed(tmp_path / "packed")
    path = run(config)
    written = json.loads((path / "run.json").read_text())
    assert list(written["stages"]) == ["calibrate", "quantize", "load", "pack", "evaluate"]
    assert len(written["calibration"]["ids"]) == 3
    assert written["execution"] == "packed"
    memory = load(*FEW, "execution=packed", f"results_dir={tmp_path}/results")
    assert Cell.of(memory).hash == written["hash"]  # one cell, whichever way it is made
    assert run(config) == path
    assert "reused" in capsys.readouterr().out
    run(streamed(tmp_path / "packed", "force=true"))

    # Killed while it was evaluated: what is written is not written again.
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    assert run(config) == path
    assert list(json.loads((path / "run.json").read_text())["stages"]) == [
        "load",
        "pack",
        "evaluate",
    ]


def test_a_streamed_cell_may_end_once_it_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = streamed(tmp_path / "packed", "evaluate=false")
    for said in ("wrote", "reused"):
        assert run(config) == tmp_path / "packed"
        assert f"{said} {tmp_path / 'packed'}" in capsys.readouterr().out
    run(load(*FEW, f"model.packed={tmp_path}/packed", f"results_dir={tmp_path}/results"))
    # It is the cell that is evaluated later, so what is written is not written again.
    path = run(streamed(tmp_path / "packed"))
    assert "calibrate" not in json.loads((path / "run.json").read_text())["stages"]


# --- kills


def killed(folder: Path, overrides: list[str], writes: int) -> None:
    """In a process of its own: streams until so many files are written, then dies."""
    inputs.load_scienceqa = problems  # type: ignore[assignment]
    inputs.open_scienceqa = opened  # type: ignore[assignment]
    torch.set_num_threads(1)
    whole, left = PartialCheckpoint._write, [writes]

    def write(self: PartialCheckpoint, name: str, how: Any) -> None:
        if not left[0]:
            how(self.partial / (name + ".tmp"))  # it has no name yet
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        whole(self, name, how)

    PartialCheckpoint._write = write  # type: ignore[method-assign]
    write_stream(streamed(folder, *overrides))


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.integration.test_streaming", "qvlm.cell.pipeline"])
    return context


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=mini_moe_llava", "method=awq", "method.n_grid=3", "method.max_shrink=0.1"],
        ["method=qlora"],
        ["method=qvlm_cdm", "method.percentiles=[1.0,0.99]", "method.mining_tokens=64"],
    ],
    ids=["awq", "qlora", "qvlm_cdm"],
)
def test_what_is_killed_goes_on_and_ends_the_same(
    overrides: list[str], server: ForkServerContext, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    partial, done = tmp_path / f"killed{PARTIAL}", [0]
    while True:
        # 5 files are two blocks and the shard of a third; then its progress is not written.
        process = server.Process(target=killed, args=(folder, overrides, 5))
        process.start()
        process.join(120)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        assert not folder.exists()
        done.append(torch.load(partial / PROGRESS, weights_only=True)["done"])
        assert done[-1] > done[-2]
    assert done == [0, 1, 3, 5, 7]  # a block is lost with every kill, and no more
    assert read_origin(folder).report["details"]["resumed_blocks"] == 7
    write_stream(streamed(tmp_path / "whole", *overrides))
    assert_same(folder, tmp_path / "whole")


def test_what_another_cell_began_is_not_gone_on_with(tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    PartialCheckpoint(folder, "another", ["block"], "cpu")
    with pytest.raises(UserError, match="begun by another cell"):
        write_stream(streamed(folder))
    (tmp_path / "packed.partial" / PROGRESS).write_bytes(b"")
    with pytest.raises(UserError, match="is damaged. Delete"):
        write_stream(streamed(folder))
    write_stream(streamed(folder, "force=true"))
    assert folder.is_dir()

    other = tmp_path / "other"
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "diary.txt").write_text("dear")
    with pytest.raises(UserError, match="holds other files"):
        write_stream(streamed(other))

    standin = write("llava", tmp_path)  # a checkpoint, but none to be replaced
    with pytest.raises(UserError, match="holds no packed checkpoint"):
        write_stream(streamed(standin.folder))
    assert (standin.folder / "tokenizer.model").is_file()


def test_after_a_full_disk_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, config = tmp_path / "whole", streamed(tmp_path / "packed")
    write_stream(streamed(whole))
    largest = max(file.stat().st_size for file in whole.iterdir())
    for limit in (100, 5000, largest - 1):
        with monkeypatch.context() as patch:
            for name in ("_write", "_finish"):  # and not what pytest captures
                write = small_files(limit)(getattr(PartialCheckpoint, name))
                patch.setattr(PartialCheckpoint, name, write)
            with pytest.raises(RunError, match=r"^save_packed: .* cannot be written"):
                write_stream(config)
        assert not (tmp_path / "packed").exists()
    write_stream(config)
    assert_same(tmp_path / "packed", whole)
    assert not (tmp_path / "packed.partial").exists()


# --- what cannot be streamed


class Looks:
    """Walks over the float model."""

    name = "Looks"

    def quantize(self, walk: Walk) -> MethodReport:
        for _ in walk.blocks():
            pass
        return MethodReport()


class Joins:
    """Has two layers in a block."""

    name = "Joins"

    def quantize(self, walk: Walk) -> MethodReport:
        next(walk.blocks([walk.names[:2], *([name] for name in walk.names[2:])]))
        return MethodReport()


@pytest.mark.parametrize(
    "method", [["qvlm"], ["qvlm_veo"], ["qvlm_cdm", "method.granularity=layer"]], ids="+".join
)
def test_what_needs_several_layers_is_refused_before_anything_runs(
    method: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*FEW, f"method={method[0]}", *method[1:]]
    words += ["stream=true", f"save_packed={tmp_path}/packed"]
    assert main([*words, f"results_dir={tmp_path}/results"]) == 2
    assert "error: stream=true is not possible with Q-VLM" in capsys.readouterr().err
    assert not (tmp_path / "packed.partial").exists()


@pytest.mark.parametrize("method", [Looks(), Joins()], ids=lambda method: method.name)
def test_a_strangers_method_is_refused_at_the_first_block(method: Any, tmp_path: Path) -> None:
    config = streamed(tmp_path / "packed")
    with Stages("test", 2) as stages, pytest.raises(UserError, match="one layer at a time"):
        stream_cell(unidentified(config), method, "cpu", stages)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stream=true"], "Give save_packed=FOLDER"),
        (["stream=true", "save_packed=x", "device=map"], "Stream with device=auto"),
        (["evaluation.limit=0"], "evaluation.limit=0 is not .* give evaluate=false"),
        (["stream=true", "save_packed=x", "evaluation.limit=0"], "give evaluate=false"),
        (["evaluation.limit=-1"], "evaluation.limit=-1"),
        (["evaluate=false"], "Give save_packed=FOLDER"),
        (["evaluate=false", "save_packed=x", "method=fp"], "a method that quantizes"),
        (["evaluate=false", "save_packed=x", "bits=fp"], "a method that quantizes"),
    ],
)
def test_wrong_options_are_said(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load(*words)


# --- packed layers back to simulated ones


@pytest.mark.parametrize("weights", ["per_tensor", "per_channel", "per_group", "normal_float"])
@pytest.mark.parametrize("inputs", ["token", "tensor", "channel", "folded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_packed_layer_is_simulated_to_the_bit(
    weights: str, inputs: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(48, 24), torch.randn(9, 48)
    lo, hi = x.amin(0), x.amax(0)
    quantizer: Quantizer = {
        "token": TokenQuantizer(4, 0.9),
        "tensor": UniformQuantizer.from_range(lo.min(), hi.max(), 4),
        "channel": UniformQuantizer.from_range(lo, hi, 4),
        "folded": UniformQuantizer.from_range(lo, hi, 4, folds=True),
    }[inputs]
    weight = linear.weight.detach()
    if inputs == "folded":
        weight = weight * quantizer.scale  # type: ignore[operator]
    fitted: Quantizer
    if weights == "normal_float":
        fitted = NormalFloatQuantizer.from_weight(weight, 4, 16)
    else:
        fitted = weight_quantizer(weight, QuantSpec(4, weights, 16))
    layer = QuantLinear.from_linear(linear.to(dtype), fitted, quantizer, layer_name="it")
    again = simulated(PackedLinear.from_quantized(layer), dtype)
    assert torch.equal(again.quantized_weight(), layer.quantized_weight())
    assert torch.equal(again(x.to(dtype)), layer(x.to(dtype)))
    assert torch.equal(again.weight_codes(), layer.weight_codes())


# --- memory


M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def peak(folder: Path, layers: int) -> None:
    """In a process of its own: streams a model of so many layers, and writes its peak, in bytes."""
    content = {**experiment.KNOWN["llava_7b"], "num_hidden_layers": layers, "mm_hidden_size": 64}
    content |= {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8}
    content |= {"vocab_size": 1024}
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=224,
        patch_size=56,
    )
    experiment.write_checkpoint(folder, content, vision)
    inputs.load_scienceqa = problems  # type: ignore[assignment]
    inputs.open_scienceqa = opened  # type: ignore[assignment]
    torch.set_num_threads(1)
    # Everything large is mapped, and given back when freed: what the allocator would keep for
    # later, several layers at times, is not what is measured here.
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    words = [f"model.path={folder}/checkpoint", f"model.vision_tower={folder}/clip"]
    words += ["model.dtype=float32", "quantizer.ranges=minmax", "model.weight_group_size=64"]
    write_stream(streamed(folder / "packed", "model=llava_7b", *words))
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (folder / "peak").write_text(str(used))


@pytest.mark.skipif(sys.platform != "linux", reason="counts kilobytes as Linux does")
def test_memory_does_not_grow_with_depth(server: ForkServerContext, tmp_path: Path) -> None:
    peaks = {}
    for layers in (2, 12):
        process = server.Process(target=peak, args=(tmp_path / str(layers), layers))
        process.start()
        process.join(120)
        assert process.exitcode == 0
        peaks[layers] = int((tmp_path / str(layers) / "peak").read_text())
    layer = 4 * (4 * 1024**2 + 3 * 1024 * 2816)  # in float32
    assert peaks[12] - peaks[2] < 2 * layer  # ten more were streamed
