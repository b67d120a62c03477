"""The tokenizer of a checkpoint, from whichever file it comes in, without remote code.

Four kinds of file are read:

- `tokenizer.json` is loaded as it is.
- `tokenizer.model` is a sentencepiece BPE model, as LLaMA has. Its pieces become the same BPE in
  the `tokenizers` library.
- `vocab.json` and `merges.txt` belong to Phi-2, and transformers' CodeGen tokenizer reads them.
- `*.tiktoken` holds byte pairs with ranks, as StableLM-2 and Qwen have. Their released tokenizers
  are Python files that a loader would have to execute, so their rules are written out here.
  transformers' `TikTokenConverter` makes other merges.

A text is tokenized in the pieces around `<image>`, as in the released code. The ids of the image
are put between the pieces, so a tokenizer does not need a token for images.
"""

import base64
import itertools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import CodeGenTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import import_protobuf

from qvlm.errors import UserError

_BLANK = "\u2581"  # stands for a blank in sentencepiece
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # types of pieces in sentencepiece_model.proto

# How StableLM-2 and Qwen split a text before byte pairs are merged. Every digit is on its own.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_END_OF_TEXT = "<|endoftext|>"
_QWEN_FILE = "qwen.tiktoken"
# The tokens after Qwen's byte pairs, in order. MoE-LLaVA used the fourth as padding.
_QWEN_SPECIAL = (
    _END_OF_TEXT,
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{index}|>" for index in range(205)),
)
_QWEN_PADDING = "<|extra_0|>"


@dataclass(frozen=True)
class TextEncoding:
    """A tokenizer, and whether its texts begin with the bos token."""

    tokenizer: PreTrainedTokenizerFast
    begins_with_bos: bool


def load_tokenizer(folder: Path, config: dict[str, Any], owner: str) -> TextEncoding:
    """Reads the tokenizer of an original checkpoint.

    Args:
        folder: Folder of the checkpoint.
        config: Content of its config.json, because a `.tiktoken` file does not say which id ends a
            text.
        owner: Name of the checkpoint in messages.

    Raises:
        UserError: If the folder has no tokenizer, or its file is damaged or of another kind.
    """
    tiktoken = sorted(folder.glob("*.tiktoken"))
    with _readable(folder, owner):
        if (folder / "tokenizer.json").is_file():
            tokenizer = _from_saved(folder)
            begins = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        elif (folder / "tokenizer.model").is_file():
            tokenizer = _from_sentencepiece(folder)
            begins = True
        elif (folder / "merges.txt").is_file():
            tokenizer = _from_merges(folder)
            begins = False
        elif tiktoken:
            tokenizer = _from_tiktoken(tiktoken[0], config)
            begins = False
        else:
            raise UserError(
                f"{owner}: {folder} has no tokenizer. Give one of: tokenizer.json, "
                "tokenizer.model, vocab.json with merges.txt, *.tiktoken."
            )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return TextEncoding(tokenizer, begins)


def read_saved_tokenizer(folder: Path, begins_with_bos: bool, owner: str) -> TextEncoding:
    """Reads a tokenizer that transformers saved, tokenizer.json and tokenizer_config.json.

    Raises:
        UserError: If a file is damaged.
    """
    with _readable(folder, owner):
        return TextEncoding(_from_saved(folder), begins_with_bos)


@contextmanager
def _readable(folder: Path, owner: str) -> Iterator[None]:
    """Turns the errors of a damaged tokenizer into one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises plain `Exception`s
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{owner}: the tokenizer in {folder} cannot be read: {reason}") from error


def _from_saved(folder: Path) -> PreTrainedTokenizerFast:
    # This class reads files only. `AutoTokenizer` would look for a class that the folder names.
    return PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)


def _from_sentencepiece(folder: Path) -> PreTrainedTokenizerFast:
    pieces = _read_sentencepiece(folder / "tokenizer.model")
    vocabulary = {piece: index for index, (piece, _, _) in enumerate(pieces)}
    scores = {piece: score for piece, score, kind in pieces if kind == _NORMAL}
    unknown = next(piece for piece, _, kind in pieces if kind == _UNKNOWN)
    merges = [
        (-score, vocabulary[piece[:cut]], vocabulary[piece[cut:]], piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    backend = Tokenizer(
        BPE(
            vocab=vocabulary,
            merges=[(left, right) for *_, left, right in sorted(merges)],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=any(kind == _BYTE for _, _, kind in pieces),
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_BLANK), normalizers.Replace(" ", _BLANK)]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(_BLANK, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(
        [
            AddedToken(piece, normalized=False, special=True)
            for piece, _, kind in pieces
            if kind in (_UNKNOWN, _CONTROL)
        ]
    )
    _add_tokens(backend, folder / "added_tokens.json")
    control = [piece for piece, _, kind in pieces if kind == _CONTROL]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token=unknown, bos_token=control[0], eos_token=control[1]
    )


def _add_tokens(backend: Tokenizer, file: Path) -> None:
    """Adds the tokens that a checkpoint was tuned with, such as `<im_start>`, with their ids."""
    if not file.is_file():
        return
    for token, index in sorted(json.loads(file.read_text()).items(), key=lambda item: item[1]):
        backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        if backend.token_to_id(token) != index:
            raise ValueError(f"{file.name} gives {token} the id {index}, which is not free")


def _read_sentencepiece(file: Path) -> list[tuple[str, float, int]]:
    """Reads the pieces of a sentencepiece BPE model.

    Returns:
        Text, score and type of each piece, in the order of their ids.

    Raises:
        ValueError: If the file is of another kind, or normalizes texts unlike LLaMA's.
    """
    try:
        model = import_protobuf().ModelProto.FromString(file.read_bytes())
    except DecodeError as error:
        raise ValueError("it is not a sentencepiece model, or it is damaged") from error
    if model.trainer_spec.model_type != model.trainer_spec.BPE or not model.pieces:
        raise ValueError("it is not a sentencepiece BPE model")
    normalizer = model.normalizer_spec
    if normalizer.precompiled_charsmap or not normalizer.add_dummy_prefix:
        raise ValueError("it normalizes texts in a way that LLaMA's does not")
    return [(piece.piece, piece.score, piece.type) for piece in model.pieces]


def _from_merges(folder: Path) -> PreTrainedTokenizerFast:
    """Reads Phi-2's tokenizer, which is CodeGen's with tokens for runs of blanks and tabs."""
    kind = json.loads((folder / "tokenizer_config.json").read_text()).get("tokenizer_class")
    if kind not in ("CodeGenTokenizer", "CodeGenTokenizerFast"):
        raise ValueError(f"tokenizer_config.json names {kind}, which is not CodeGenTokenizer")
    # transformers silently takes an empty vocabulary for a missing file, so both are read here.
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    _, *merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    if len(merges) + 256 > len(vocabulary):
        raise ValueError("merges.txt has more tokens than vocab.json")
    # Its files ask to remove blanks before punctuation from answers, which we do not do.
    tokenizer = CodeGenTokenizer.from_pretrained(
        folder, clean_up_tokenization_spaces=False, trust_remote_code=False
    )
    added = folder / "added_tokens.json"
    for token, index in json.loads(added.read_text()).items() if added.is_file() else ():
        if tokenizer.convert_tokens_to_ids(token) != index:
            raise ValueError(f"{added.name} gives {token!r} the id {index}, which it does not have")
    return tokenizer


def _from_tiktoken(file: Path, config: dict[str, Any]) -> PreTrainedTokenizerFast:
    lines = (line.split() for line in file.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    letters = _byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    pairs = [
        _last_merge(token, ranks)
        for token in sorted(ranks, key=ranks.__getitem__)
        if len(token) > 1
    ]
    merges = [(spell(left), spell(right)) for left, right in pairs]
    special = _special_tokens(file, ranks, config)
    for unused in range(max(ranks.values()) + 1, min(special.values())):
        vocabulary[f"<|unused{unused}|>"] = unused
    vocabulary |= special
    backend = Tokenizer(BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in special]
    )
    padding = _QWEN_PADDING if _QWEN_PADDING in special else _END_OF_TEXT
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=_END_OF_TEXT,
        eos_token=_END_OF_TEXT,
        pad_token=padding,
    )


def _special_tokens(
    file: Path, ranks: Mapping[bytes, int], config: Mapping[str, Any]
) -> dict[str, int]:
    """Returns the special tokens that belong to a `.tiktoken` file, which does not hold them.

    Qwen's config.json does not say which id ends a text, but its generation_config.json does. A
    file of byte pairs that lacks a line contradicts it. Source: `tokenization_qwen.py`.
    """
    if file.name != _QWEN_FILE:
        return {_END_OF_TEXT: int(config["eos_token_id"])}
    first = max(ranks.values()) + 1
    generation = file.parent / "generation_config.json"
    if generation.is_file():
        end = json.loads(generation.read_text())["eos_token_id"]
        if first not in (end if isinstance(end, list) else [end]):
            raise ValueError(
                f"{file.name} has byte pairs up to {first - 1}, but generation_config.json gives "
                f"{_END_OF_TEXT} the id {end}"
            )
    return {token: first + index for index, token in enumerate(_QWEN_SPECIAL)}


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Returns the two parts that merge into a token: merging by rank stops one step before it."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right) for left, right in itertools.pairwise(parts)]
        best = min((rank for rank in pairs if rank is not None), default=None)
        if best is None:
            raise ValueError(f"token {token!r} cannot be made from smaller ones")
        at = pairs.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _byte_letters() -> dict[int, str]:
    """Returns the letter for each byte in byte-level BPE, which is the byte if it is printable."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    return letters | {byte: chr(256 + index) for index, byte in enumerate(hidden)}
