"""ScienceQA-like problems and a small model that answers them."""

import random
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from qvlm.data.prompts import IMAGE_TOKEN, Prompting
from qvlm.data.prompts import OFFICIAL_LETTERS as LETTERS
from qvlm.models import Llava, LlavaArchitecture, LoadedModel

SUBJECTS = ("natural science", "social science", "language science")


TEXT = datasets.Value("string")


FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "choices": datasets.List(TEXT),
        "answer": datasets.Value("int64"),
        **dict.fromkeys(
            ("question", "hint", "task", "grade", "subject", "topic", "category", "skill"), TEXT
        ),
        **dict.fromkeys(("lecture", "solution"), TEXT),
    }
)


def make_problems(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Problems of very different lengths, about half of them with an image or a hint."""
    rng = random.Random(seed)
    problems = []
    for _ in range(count):
        pixels = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (12, 12, 3))
        choices = [rng.choice("rstuvw") for _ in range(rng.randint(2, 5))]
        problems.append(
            dict.fromkeys(FEATURES, "")
            | {
                "image": Image.fromarray(pixels.astype("uint8")) if rng.random() < 0.5 else None,
                "question": " ".join(rng.choice("ghijklmno") for _ in range(rng.randint(1, 30))),
                "choices": choices,
                "answer": rng.randrange(len(choices)),
                "hint": "p q" if rng.random() < 0.5 else "",
                "grade": f"grade{rng.randint(1, 12)}",
                "subject": rng.choice(SUBJECTS),
                "skill": rng.choice(["first", "second"]),
            }
        )
    return problems


def make_dataset(problems: list[dict[str, Any]], split: str | None = "test") -> datasets.Dataset:
    return datasets.Dataset.from_list(problems, features=FEATURES, split=split)


def make_model(seed: int = 2) -> LoadedModel:
    """Writes letters and ends of sequence only: some answers are one letter, which is parsable."""
    prompting = Prompting()
    words = set(prompting.prompt({"image": None, "question": "", "hint": "", "choices": []}))
    specials = ["<pad>", "<s>", "</s>", "<unk>", IMAGE_TOKEN]
    vocabulary = specials + sorted(words | set(map(chr, range(33, 127))))
    tokenizer = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+|(?=\S)"), "removed")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
    )
    torch.manual_seed(seed)
    architecture = LlavaArchitecture(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=12,
            patch_size=6,
        ),
        text_config=LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.3,
        ),
        image_token_index=vocabulary.index(IMAGE_TOKEN),
        vision_feature_layer=-2,
        projector_type="linear",
    )
    model = Llava(architecture).eval()
    written = torch.tensor([vocabulary.index(word) for word in (*LETTERS, "</s>")])
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[written] = torch.randn(len(written), 32)
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12}
    )
    return LoadedModel(model, fast, image_processor, prompting, "toy")
