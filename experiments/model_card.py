"""Writes the model card of the miniatures from records and training logs.

`python -m experiments.model_card` reads the newest full-precision record of each miniature under
`results/runs` and the training log beside its weights, and writes
`qvlm/models/miniature/README.md`. Every number in the card's tables comes from there; the history
of the training is written by hand in `HISTORY`.
"""

import argparse
import json
import sys
from pathlib import Path

import pandas as pd

from qvlm.evaluation import skill_metrics
from qvlm.evaluation.metrics import CLASSES
from qvlm.models import load_model
from qvlm.models.load import MINIATURES
from qvlm.records.record import Record, find_records

HISTORY = """\
# The embedded miniatures

`mini_llava` stands for LLaVA-v1.3, `mini_moe_llava` for MoE-LLaVA-StableLM. Both read images of
48 x 48 pixels through a CLIP tower (4 layers, 128 wide, patches of 8, features of layer -2 without
the class token, which gives 36 image tokens) and write word-level text. `mini_llava` has a linear
projector and a LLaMA (4 layers, 128 wide, MLP 384). `mini_moe_llava` has a two-layer projector and
a StableLM (4 layers, 128 wide, 4 experts of 256, top 2, in layers 0 and 2; an MLP of 256 in the
other layers). Weights are stored in bfloat16.

## Training

`make miniature` trains both from scratch with the recipe in
[experiments/train_miniature.py](../../../experiments/train_miniature.py): a vision phase, a
look-up phase, and a joint phase on fresh problems of the training split. The shipped weights are
its result, with one thread each on a 2-core machine that did other work as well. `mini_llava` was
trained in one run, `mini_moe_llava` in two. A restart at another rate from its checkpoint of step
4,600 was tried and dropped (docs/LOG.md), and the restart of the recipe began from the same
checkpoint. A test shows that a resumed run ends with the weights of an undisturbed one.
`training.jsonl` beside the weights is the log, with the losses and the validation accuracy by
skill. The length of the joint phase was chosen on the validation split. No outlier channels were
injected: the activations are as training left them.

## Full precision on the test split

Answers are greedy, and unparsable ones count as wrong. {n} questions, 95 % Wilson intervals.
"""


def newest_full_precision(runs: Path, model: str) -> Record:
    """The newest complete full-precision record of a model.

    Raises:
        SystemExit: if there is none.
    """
    found = [r for r in find_records(runs) if r.model == model and r.method == "FP"]
    if not found:
        sys.exit(f"{runs} has no full-precision record of {model}; run make table2 first")
    return max(found, key=lambda record: record.path.stat().st_mtime)


def main() -> None:
    """Writes the card."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("results/runs"))
    options = parser.parse_args()
    names = sorted(path.parent.name for path in MINIATURES.glob("*/config.json"))
    records = {name: newest_full_precision(options.runs, name) for name in names}
    classes = {
        name: {
            c: f"{row['accuracy']:.1f} ({row['ci_low']:.1f} to {row['ci_high']:.1f})"
            for c, row in record.metrics["classes"].items()
        }
        for name, record in records.items()
    }
    asked = next(iter(records.values())).metrics["classes"]["Avg"]["n"]
    lines = [HISTORY.format(n=asked)]
    lines += ["| class | " + " | ".join(names) + " |", "|---" + "|---" * len(names) + "|"]
    lines += [f"| {c} | " + " | ".join(classes[name][c] for name in names) + " |" for c in CLASSES]
    skills = {name: skill_metrics(record.predictions) for name, record in records.items()}
    merged = pd.concat(
        [
            frame.set_index(["subject", "skill"])["accuracy"].rename(n)
            for n, frame in skills.items()
        ],
        axis=1,
    ).sort_index()
    lines += ["", "| skill | " + " | ".join(names) + " |", "|---" + "|---" * len(names) + "|"]
    for row in merged.reset_index().to_dict("records"):
        lines.append(f"| {row['skill']} | " + " | ".join(f"{row[n]:.1f}" for n in names) + " |")
    lines += ["", "## Cost", ""]
    for name in names:
        count = sum(p.numel() for p in load_model(name, name).model.parameters())
        log = json.loads((MINIATURES / name / "training.jsonl").read_text().splitlines()[-1])
        size = (MINIATURES / name / "model.safetensors").stat().st_size / 2**20
        lines.append(
            f"- `{name}`: {count:,} parameters, {size:.1f} MiB; trained in "
            f"{log['minutes']:.0f} minutes on one thread, {log['lookup_steps']:,} look-up and "
            f"{log['joint_steps']:,} joint steps."
        )
    (MINIATURES / "README.md").write_text("\n".join(lines) + "\n")
    print(f"wrote {MINIATURES / 'README.md'}")


if __name__ == "__main__":
    main()
