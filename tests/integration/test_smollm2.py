"""SmolLM2 itself, where `make real` has been: its weights answer, its tokenizer splits digits."""

from pathlib import Path

import pytest

from qvlm.data.prompts import Prompting
from qvlm.models import load_model
from qvlm.models.architectures import architecture

FOLDER = Path("~/.cache/qvlm/smollm2").expanduser()
if not (FOLDER / "config.json").is_file():
    pytest.skip("SmolLM2 is not converted; `make real` does it", allow_module_level=True)
# Every greedy token of these answers leads by half a logit or more, so other roundings should give
# them as well. With "What is the capital of Italy?" "Il" leads "The" by 0.1, and a wrong answer
# follows: these weights have been rounded to 4 bits.
QUESTIONS = {
    "What is the capital of Japan?": "The capital of Japan is Tokyo.",
    "What is the capital of Russia?": "The capital of Russia is Moscow.",
    "Name the capital city of Italy.": "The capital city of Italy is Rome.",
    "What is the capital of Germany?": "The capital of Germany is Berlin.",
}


def test_it_answers_greedily() -> None:
    loaded = load_model(FOLDER, "smollm2", Prompting("CQM-A", "smollm2"))
    tokenizer = loaded.tokenizer
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in QUESTIONS
    ]
    batch = loaded.encode_prompts(prompts, [[]] * len(prompts))
    generated = loaded.model.generate(**batch, max_new_tokens=12, do_sample=False)
    answers = loaded.decode(generated[:, batch["input_ids"].shape[1] :])
    assert answers == list(QUESTIONS.values())


def test_it_is_the_architecture_that_fit_and_preflight_know() -> None:
    loaded = load_model(FOLDER, "smollm2", Prompting("CQM-A", "smollm2"))
    known = architecture("smollm2")
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads"):
        assert getattr(loaded.model.config, key) == getattr(known, key)
    assert loaded.model.config.vocab_size == known.vocab_size
    assert loaded.model.config.tie_word_embeddings


def test_the_one_with_a_tower_is_the_architecture_that_fit_and_preflight_know() -> None:
    folder = FOLDER.parent / "smollm2_llava"
    if not (folder / "config.json").is_file():
        pytest.skip("smollm2_llava is not assembled; `make real` does it")
    loaded = load_model(folder, "smollm2_llava", Prompting("QCM-LEA", "smollm2"))
    known = architecture("smollm2_llava")
    for part in ("vision_config", "text_config"):
        own, expected = getattr(loaded.model.config, part), getattr(known, part)
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers"):
            assert getattr(own, key) == getattr(expected, key)
    assert not loaded.begins_with_bos
    assert sum(p.numel() for p in loaded.model.parameters()) > 134e6


def test_its_tokenizer_and_its_prompt_are_those_it_was_tuned_with() -> None:
    loaded = load_model(FOLDER, "smollm2", Prompting("CQM-A", "smollm2"))
    ids = loaded.tokenizer("in 1859")["input_ids"]
    assert len(ids) == 6  # a blank and every digit are tokens of their own
    problem = {"question": "q", "choices": ["a", "b"], "hint": "", "answer": 0, "image": None}
    prompt = loaded.prompting.prompt(problem)
    request = prompt.partition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
    assert prompt == loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": request}], tokenize=False, add_generation_prompt=True
    )
