"""The outlier report finds what was planted, and leaves the rows of other models alone."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from qvlm.data.prompts import Prompting
from qvlm.models.loaded import LoadedModel
from qvlm.tables.outliers import RESIDUAL, main, measure, page
from tests.helpers.language_models import (
    save_language_model,
    tiny_language_model,
    tiny_tokenizer,
    write_texts,
)

pytestmark = pytest.mark.slow


def batch() -> dict[str, torch.Tensor]:
    """Rows that begin with bos."""
    ids = torch.randint(3, 14, (8, 16), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def rows(model: torch.nn.Module) -> pd.DataFrame:
    """The report of a model."""
    prompting = Prompting("CQM-A", "smollm2")
    loaded = LoadedModel(model, tiny_tokenizer(), None, prompting, "tiny")  # type: ignore[arg-type]
    return measure(loaded, [batch()])


def value(found: pd.DataFrame, layer: int, name: str, key: str) -> float:
    """One number of the report."""
    row = found[(found["layer"] == layer) & (found["input"] == name)]
    assert len(row) == 1
    return float(row[key].iloc[0])


def test_a_planted_channel_shows_where_it_is() -> None:
    model = tiny_language_model()
    plain = rows(model)
    model.model.layers[1].input_layernorm.weight.data[5] *= 40
    found = rows(model)
    assert value(found, 1, "attention", "channel") > 10 * value(plain, 1, "attention", "channel")
    assert value(found, 1, "attention", "kurtosis") > 3 * value(plain, 1, "attention", "kurtosis")
    assert value(found, 0, "attention", "channel") == value(plain, 0, "attention", "channel")


def test_statistics_equal_their_definitions() -> None:
    model = tiny_language_model()
    seen: list[torch.Tensor] = []
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].detach())
    )
    found = rows(model)
    x = seen[0].double()
    others = x[:, 1:].flatten()
    largest = x[:, 1:].abs().amax((0, 1))
    assert value(found, 0, "MLP output", "channel") == pytest.approx(
        float(largest.max() / largest.median()), rel=1e-5
    )
    spread = (others - others.mean()).pow(2).mean()
    fourth = (others - others.mean()).pow(4).mean()
    assert value(found, 0, "MLP output", "kurtosis") == pytest.approx(
        float(fourth / spread**2), rel=1e-5
    )
    assert value(found, 0, "MLP output", "first") == pytest.approx(
        float(x[:, 0].abs().max() / largest.max()), rel=1e-5
    )


def test_a_massive_first_token_shows_in_the_residual_stream() -> None:
    model = tiny_language_model()
    model.model.embed_tokens.weight.data[1, 0] = 1000.0
    found = rows(model)
    assert value(found, 1, RESIDUAL, "first_norm") > 10 * value(found, 1, RESIDUAL, "norm")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("model=foo", "model=foo is not a known option. Choose one of: "),
        ("bits=w4a4", "bits=w4a4 is not possible here: outliers are those of the model in full"),
        ("method=awq", "method=awq is not possible here"),
        ("model.packed=mine", "model.packed=mine is not possible here"),
        ("calibration.seeds=3", "calibration.seeds is not a known key. Choose one of: "),
    ],
)
def test_a_wrong_option_is_one_sentence(
    word: str, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([word, f"--out={tmp_path}"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")


def test_models_stand_side_by_side(tmp_path: Path) -> None:
    texts, out = write_texts(tmp_path / "texts"), tmp_path / "out"
    for name, seed in (("one", 0), ("two", 1), ("one", 2)):
        folder = save_language_model(tmp_path / f"{name}{seed}", seed)
        words = ["model=smollm2", f"model.name={name}", f"model.path={folder}", "device=cpu"]
        words += ["data=text", f"data.source={texts}"]
        words += ["calibration.samples=4", "calibration.tokens=12"]
        assert main([*words, f"--out={out}", "--command=make outliers"]) == 0
    kept = pd.read_csv(out / "outliers.csv")
    assert kept.groupby("model").size().tolist() == [10, 10]
    text = (out / "outliers.md").read_text()
    assert text == page(kept, "make outliers")
    assert (out / "outliers.png").read_bytes().startswith(b"\x89PNG")
