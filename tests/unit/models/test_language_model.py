"""A LLaMA alone: loaded, prompted, quantized, packed and streamed like any other model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from qvlm.cell.identity import Cell
from qvlm.cell.pipeline import run_cell
from qvlm.config.schema import RunConfig
from qvlm.data.prompts import Prompting
from qvlm.errors import UserError
from qvlm.methods.awq import AWQ
from qvlm.methods.awq.rescaling import find_rescalings
from qvlm.methods.layerwise import LayerWise
from qvlm.methods.qlora import QLoRA
from qvlm.methods.qvlm import QVLM
from qvlm.methods.rtn import RTN
from qvlm.models import load_model
from qvlm.packing import packed_layers
from qvlm.planning.estimates import find_shape, memory
from qvlm.planning.preflight import preflight
from qvlm.quantization import (
    QuantizationConfig,
    QuantSpec,
    Walk,
    check_bits,
    expected_layers,
    measure_bits,
)
from qvlm.records.record import Record
from tests.helpers.configs import load
from tests.helpers.language_models import save_language_model, tiny_language_model, write_texts
from tests.helpers.standins import write_weights

PROMPTING = Prompting("CQM-A", "smollm2")
PROBLEM = {
    **{"question": "one ?", "choices": ["two", "ten"], "hint": "", "answer": 1, "image": None},
    **{"lecture": "", "solution": ""},
}
LINEARS = 2 * 7


def quantization(**options: Any) -> QuantizationConfig:
    """4 bits, static scales per channel, groups of the largest divisor of 24 and 40."""
    language = QuantSpec(4, "per_channel")
    vision = QuantSpec(4, "per_token")
    return QuantizationConfig(QuantSpec(4, "per_group", None), language, vision, **options)


def batches() -> list[dict[str, torch.Tensor]]:
    """Two batches of rows of equal length."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 14, (4, 12), generator=random)
    ids[:, 0] = 1
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(2)]


def test_a_folder_of_transformers_loads_to_the_same_logits(tmp_path: Path) -> None:
    folder = save_language_model(tmp_path / "llama")
    loaded = load_model(folder, "llama", PROMPTING)
    assert not loaded.reads_images
    assert loaded.image_tokens == 0
    plain = LlamaForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        for batch in batches():
            assert torch.equal(loaded.model(**batch).logits, plain(**batch).logits)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_tied_head_loads_only_if_it_is_the_embeddings(tmp_path: Path, shards: int) -> None:
    folder = save_language_model(tmp_path / "llama")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    embeddings = tensors["model.embed_tokens.weight"]

    def with_head(head: torch.Tensor) -> None:  # of two shards the first has it, without embeddings
        write_weights(folder, {**tensors, "lm_head.weight": head}, shards, safetensors=True)

    with_head(embeddings.clone())
    loaded = load_model(folder, "llama", PROMPTING)
    assert torch.equal(loaded.model.lm_head.weight, embeddings)
    with_head(embeddings + 1)
    with pytest.raises(UserError, match="lm_head.weight, but config.json ties .* Set tie_word_emb"):
        load_model(folder, "llama", PROMPTING)
    with_head(embeddings[:-1].clone())
    with pytest.raises(UserError, match="lm_head.weight .* has shape"):
        load_model(folder, "llama", PROMPTING)


def test_an_image_and_a_tower_are_refused_by_name(tmp_path: Path) -> None:
    folder = save_language_model(tmp_path / "llama")
    loaded = load_model(folder, "llama", PROMPTING)
    with pytest.raises(ValueError, match="llama reads no image"):
        loaded.encode_prompts(["<image>"], [[object()]])  # type: ignore[list-item]
    with pytest.raises(UserError, match="has no vision tower"):
        load_model(folder, "llama", PROMPTING, image_size=224)


def test_a_tokenizer_of_other_weights_is_refused(tmp_path: Path) -> None:
    folder = save_language_model(tmp_path / "llama", vocab_size=8)
    with pytest.raises(UserError, match="has 14 tokens, but config.json has a vocabulary of 8"):
        load_model(folder, "llama", PROMPTING)


def test_the_prompt_is_what_the_checkpoints_own_template_makes() -> None:
    jinja2 = pytest.importorskip("jinja2")
    template = jinja2.Template(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n",
        keep_trailing_newline=True,
    )
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    request = (
        "Context: N/A\nQuestion: one ?\nOptions: (A) two (B) ten\n"
        "Answer with the option's letter from the given choices directly."
    )
    messages = [{"role": "system", "content": system}, {"role": "user", "content": request}]
    assert PROMPTING.prompt(PROBLEM) == template.render(messages=messages)
    assert PROMPTING.target(PROBLEM) == "B<|im_end|>"


@pytest.mark.parametrize(
    "method",
    [RTN(), AWQ(), QLoRA(), LayerWise(), QVLM(veo=False)],
    ids=lambda method: str(method.name),
)
def test_every_method_quantizes_every_linear_and_proves_it(method: Any) -> None:
    model = tiny_language_model()
    expected = expected_layers(model, vision_tower=True)
    assert len(expected) == LINEARS
    assert expected[0] == "model.layers.0.self_attn.q_proj"
    config = quantization()
    method.quantize(Walk(model, batches(), config))
    assert check_bits(measure_bits(model, expected, batches(), config)) == []


def test_tuning_a_tower_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="image"):
        QVLM().quantize(Walk(tiny_language_model(), batches(), quantization()))


def test_awq_leaves_grouped_values_alone_as_llm_awq_does() -> None:
    for key_value_heads, expected in ((2, False), (4, True)):
        model = tiny_language_model(num_key_value_heads=key_value_heads)
        block = next(iter(Walk(model, batches(), quantization()).blocks()))
        sources = {rescaling.source for rescaling in find_rescalings(block)}
        assert {"input_layernorm", "post_attention_layernorm", "mlp.up_proj"} <= sources
        assert ("self_attn.v_proj" in sources) == expected


def test_group_sizes_divide_every_width() -> None:
    model = tiny_language_model(
        hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3
    )
    RTN().quantize(Walk(model, batches(), quantization()))
    layer = model.model.layers[0]
    assert layer.self_attn.q_proj.weight_quantizer.group_size == 96
    assert layer.mlp.down_proj.weight_quantizer.group_size == 128


@pytest.fixture
def cell(tmp_path: Path) -> Any:
    """Makes the configuration of a cell of a tiny LLaMA on tiny texts."""
    checkpoint = save_language_model(tmp_path / "llama")
    texts = write_texts(tmp_path / "texts")

    def make(*overrides: str) -> RunConfig:
        return load(
            *("model=smollm2", "model.name=llama", f"model.path={checkpoint}", "data=text"),
            *(f"data.source={texts}", f"results_dir={tmp_path}/results", "tracking=off"),
            *("device=cpu", "calibration.samples=4", "calibration.tokens=12"),
            *overrides,
        )

    return make


def record_of(config: RunConfig) -> Record:
    """Runs a cell and reads its record."""
    return Record.load(run_cell(Cell.of(config)))


def test_a_cell_measures_its_distance_to_full_precision(cell: Any) -> None:
    full, quantized = record_of(cell("method=fp")), record_of(cell("method=rtn", "bits=w4a4"))
    fine = record_of(cell("method=rtn", "bits=w8a8"))
    assert full.metrics["text"]["kl"] is None
    assert full.metrics["text"]["tokens"] == sum(40 + number for number in range(6))
    kls = [record.metrics["text"]["kl"]["value"] for record in (fine, quantized)]
    assert 0 < kls[0] < kls[1] / 2
    assert len(quantized.layers) == LINEARS
    assert quantized.run["exceeding"] == []
    assert quantized.run["calibration"]["ids"] == sorted(quantized.run["calibration"]["ids"])
    assert len(list((full.path.parents[1] / "references").iterdir())) == 1


def test_texts_are_part_of_what_identifies_a_record(cell: Any) -> None:
    before = Cell.of(cell("method=rtn", "bits=w4a4"))
    file = Path(before.config.data.source) / "test" / "0.txt"
    file.write_text("ten ten ten", encoding="utf-8")
    assert Cell.of(cell("method=rtn", "bits=w4a4")).hash != before.hash


def test_packed_and_streamed_cells_give_the_same_model(cell: Any, tmp_path: Path) -> None:
    options = ("method=rtn", "bits=w4a4")
    whole = record_of(cell(*options, f"save_packed={tmp_path}/whole"))
    streamed = record_of(cell(*options, f"save_packed={tmp_path}/streamed", "stream=true"))
    again = record_of(cell(f"model.packed={tmp_path}/streamed"))
    first, second = (
        load_model(tmp_path / name, "llama", PROMPTING).model.state_dict()
        for name in ("whole", "streamed")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    perplexities = {r.metrics["text"]["perplexity"]["value"] for r in (whole, streamed, again)}
    assert len(perplexities) == 1
    assert streamed.metrics["text"]["kl"] == whole.metrics["text"]["kl"]
    assert again.metrics["text"]["kl"] is None  # it does not say which weights it was made of
    loaded = load_model(tmp_path / "whole", "llama", PROMPTING)
    assert len(packed_layers(loaded.model)) == LINEARS


def test_a_stream_without_a_reference_says_so(cell: Any, tmp_path: Path) -> None:
    words = ("method=rtn", "bits=w4a4", f"save_packed={tmp_path}/streamed", "stream=true")
    assert record_of(cell(*words)).metrics["text"]["kl"] is None


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("quantizer.first_token=float", "quantizer.first_token=float is not for packed"),
        ("quantizer=released", "per_channel_prompt is not for packed"),
    ],
)
def test_what_has_no_packed_form_is_refused_at_once(
    cell: Any, override: str, sentence: str
) -> None:
    words = ("method=rtn", "bits=w4a4", "execution=packed", override)
    with pytest.raises(UserError, match=sentence):
        Cell.of(cell(*words))


def test_its_memory_is_predicted(cell: Any) -> None:
    config = cell("method=rtn", "bits=w4a4")
    shape = find_shape(config.model)
    assert shape is not None
    assert shape.tower_parameters == 0
    assert memory(config, shape) > 4 * shape.parameters


def test_preflight_reads_nothing_heavy(cell: Any, capsys: pytest.CaptureFixture[str]) -> None:
    preflight([cell("method=rtn", "bits=w4a4")])
    shown = capsys.readouterr().out
    assert "model llama" in shown
    assert "data text" in shown
    assert "vision tower" not in shown.partition("Memory is")[0]


def test_a_missing_folder_names_the_command_that_makes_it(tmp_path: Path) -> None:
    config = load("model=smollm2", f"model.path={tmp_path}/absent", "data=text", "device=cpu")
    with pytest.raises(UserError, match="Give the command make real"):
        Cell.of(config)
