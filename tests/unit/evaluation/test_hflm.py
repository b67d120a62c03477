"""The adapter beside lm-eval's own model of transformers: the same numbers and texts."""

import warnings
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from qvlm.data.prompts import Prompting
from qvlm.errors import UserError
from qvlm.evaluation.adapter import InMemoryModel
from qvlm.models import LoadedModel
from tests.helpers.language_models import tiny_language_model

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|im_end|>"]
TEXT = "the quick brown fox jumps over the lazy dog. hello world, this is a test; café naïve"
LENGTH = 48
CONTEXTS = [
    "the quick",
    "hello world,  ",
    "café",
    "a test; " * 12,
    "this is\n",
    "the lazy dog. " * 9,
]


def byte_pairs(begins_with_bos: bool) -> PreTrainedTokenizerFast:
    """A tokenizer that merges bytes to words, as those of real language models do."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 50, trainer)
    if begins_with_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))]
        )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    extra = {"end_token": "<|im_end|>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, extra_special_tokens=extra, **names)


@pytest.fixture(scope="module", params=[True, False], ids=["bos", "no bos"])
def both(request: pytest.FixtureRequest) -> tuple[HFLM, LoadedModel]:
    tokenizer = byte_pairs(request.param)
    own = tiny_language_model(vocab_size=len(tokenizer), max_position_embeddings=LENGTH)
    with torch.no_grad():  # answers hold special tokens now and then
        own.get_input_embeddings().weight[[3, 4]] *= 4
    theirs = LlamaForCausalLM(own.config).eval()
    theirs.load_state_dict(own.state_dict())
    theirs.tie_weights()
    peer = HFLM(pretrained=theirs, tokenizer=tokenizer, device="cpu", max_length=LENGTH)
    named = {"begins_with_bos": request.param}
    return peer, LoadedModel(own, tokenizer, None, Prompting(), "tiny", **named)


def instance(kind: str, *arguments: Any) -> Instance:
    return Instance(kind, {"question_id": "q7"}, arguments, 0)  # type: ignore[arg-type]


def answered(own: LoadedModel, batch_size: int, kind: str, requests: list[Instance]) -> Any:
    with warnings.catch_warnings(action="ignore"):  # long contexts are shortened
        return getattr(InMemoryModel(own, batch_size, progress=False), kind)(requests)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_likelihoods_agree(both: tuple[HFLM, LoadedModel], batch_size: int) -> None:
    peer, own = both
    continuations = [" brown fox", "\nhello", " na\u00efve dog."]
    pairs = [(context, text) for context in ("", *CONTEXTS) for text in continuations]
    requests = [instance("loglikelihood", *pair) for pair in pairs]
    found = answered(own, batch_size, "loglikelihood", requests)
    expected = peer.loglikelihood(requests, disable_tqdm=True)
    assert [each[0] for each in found] == pytest.approx([each[0] for each in expected], abs=1e-4)
    assert [each[1] for each in found] == [each[1] for each in expected]


@pytest.mark.parametrize("until", [["<|im_end|>"], ["<|im_end|>", "the q"], ["a", "<pad>"], ["fo"]])
def test_generated_texts_agree(both: tuple[HFLM, LoadedModel], until: list[str]) -> None:
    """A text that ends an answer may be a special token, which answers themselves do not show."""
    peer, own = both
    # A batch of lm-eval's goes on until its last row ends, and shows what follows a special token.
    requests = [
        instance("generate_until", c, {"until": until, "max_gen_toks": 24}) for c in CONTEXTS
    ]
    expected = [peer.generate_until([each], disable_tqdm=True)[0] for each in requests]
    assert answered(own, 4, "generate_until", requests) == expected


def test_a_continuation_without_tokens_of_its_own_is_refused(
    both: tuple[HFLM, LoadedModel],
) -> None:
    """It would have a likelihood of 1 and win over any other choice."""
    _, own = both
    with pytest.raises(UserError, match=r"question q7 has a continuation, 'ick', whose tokens are"):
        answered(own, 1, "loglikelihood", [instance("loglikelihood", "the qu", "ick")])
    empty = [instance("loglikelihood", "the", "")]
    assert answered(own, 1, "loglikelihood", empty) == [(0.0, True)]


def test_a_text_may_name_an_image_or_be_empty(both: tuple[HFLM, LoadedModel]) -> None:
    _, own = both
    pairs = [("the <image>", " fox <image>"), ("the ", " fox ")]
    named, bare = answered(
        own, 1, "loglikelihood", [instance("loglikelihood", *pair) for pair in pairs]
    )
    assert named == bare
    settings = {"max_gen_toks": 5}
    (text,) = answered(own, 1, "generate_until", [instance("generate_until", "", settings)])
    (begun,) = answered(own, 1, "generate_until", [instance("generate_until", "<s>", settings)])
    assert text == begun or own.begins_with_bos
