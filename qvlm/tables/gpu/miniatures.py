"""Whether the embedded models answer on the GPU as on the CPU."""

import time
from functools import partial
from itertools import islice
from typing import Any

import torch

from qvlm.data import miniature
from qvlm.methods.rtn import RTN
from qvlm.models.load import load_model
from qvlm.packing import pack_model
from qvlm.quantization import QuantizationConfig, QuantSpec, Walk, batch_by_length
from qvlm.tables.gpu.bench import Bench, Measures

BATCH = 50


@torch.no_grad()
def agreement(bench: Bench, name: str, packed: bool) -> Measures:
    """Counts the answers of a miniature that are the same on both devices, token for token."""
    loaded = load_model(name, name)
    count = bench.sizes.problems
    problems = list(islice(miniature.stream("test", 1), count))
    if packed:
        samples = list(islice(miniature.stream("train", 1), 16 if bench.gpu else 2))
        quantization = QuantizationConfig(
            weight=QuantSpec(4, "per_group", 64),
            language=QuantSpec(4, "per_channel_group"),
            vision=QuantSpec(4, "per_token"),
        )
        RTN().quantize(Walk(loaded.model, batch_by_length(loaded, samples, 8), quantization))
        pack_model(loaded.model)
    answers: list[list[str]] = []
    took: list[float] = []
    options = {
        "max_new_tokens": 64,
        "do_sample": False,
        "eos_token_id": loaded.tokenizer.eos_token_id,
        "pad_token_id": loaded.tokenizer.pad_token_id,
    }
    torch.backends.cudnn.allow_tf32 = False
    model: Any = loaded.model
    for device in ("cpu", bench.device):
        model.to(device)
        found: list[str] = []
        begun = time.perf_counter()
        for start in range(0, count, BATCH):
            batch = loaded.encode(problems[start : start + BATCH])
            ids = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
            found += loaded.decode(ids.cpu())
        took.append(time.perf_counter() - begun)
        answers.append(found)
    same = sum(a == b for a, b in zip(*answers, strict=True))
    choices = [
        [
            loaded.prompting.parse(text, len(problem["choices"]))
            for text, problem in zip(found, problems, strict=True)
        ]
        for found in answers
    ]
    alike = sum(a == b for a, b in zip(*choices, strict=True))
    return {
        "same answers": (same, f"of {count}"),
        "same choices": (alike, f"of {count}"),
        "CPU": (f"{took[0]:.1f}", "s"),
        "GPU": (f"{took[1]:.1f}", "s"),
    }


def miniatures(bench: Bench) -> None:
    """Compares both miniatures, in full precision and packed."""
    for name in ("mini_llava", "mini_moe_llava") if bench.gpu else ("mini_llava",):
        for packed in (False, True):
            title = "W4A4 packed" if packed else "full precision"
            bench.do(
                *("miniature", name, title, BATCH, "answers"),
                work=partial(agreement, bench, name, packed),
            )
