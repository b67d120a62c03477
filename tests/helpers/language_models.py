"""Tiny LLaMAs alone with random weights, as checkpoint folders with a tokenizer of their own."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from qvlm.models.networks import LanguageModel

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", ".")
SPECIAL = ("<unk>", "<|im_start|>", "<|im_end|>")


def tiny_language_model(seed: int = 0, **sizes: int) -> LanguageModel:
    """A LLaMA of 2 layers, 24 wide, with grouped queries and tied embeddings, in evaluation mode.

    Args:
        seed: Seed of the weights.
        sizes: Further fields of its configuration.
    """
    torch.manual_seed(seed)
    options = {
        "vocab_size": len(SPECIAL) + len(WORDS),
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        **sizes,
    }
    config = LlamaConfig(
        **options,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.3,
    )
    return LanguageModel(config).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, with ChatML's two special tokens."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<unk>",
    )


def save_language_model(folder: Path, seed: int = 0, **sizes: int) -> Path:
    """Writes a tiny LLaMA as transformers does, and returns the folder."""
    tiny_language_model(seed, **sizes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_texts(folder: Path, documents: int = 6, words: int = 40) -> Path:
    """Writes the splits of a folder of texts that the tiny tokenizer knows."""
    random = torch.Generator().manual_seed(0)
    for split in ("train", "validation", "test"):
        (folder / split).mkdir(parents=True)
        for number in range(documents):
            drawn = torch.randint(len(WORDS), (words + number,), generator=random)
            text = " ".join(WORDS[index] for index in drawn)
            (folder / split / f"{number}.txt").write_text(text, encoding="utf-8")
    return folder
