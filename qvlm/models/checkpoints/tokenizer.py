"""The tokenizer of an original checkpoint, from whichever file it comes in, without remote code.

Four kinds of file are read:

- `tokenizer.json`: as it is.
- `tokenizer.model`: a sentencepiece BPE model, as LLaMA has. Its pieces are read from the protocol
  buffer and become the same BPE in the `tokenizers` library.
- `vocab.json` and `merges.txt`: Phi-2's, by transformers' own CodeGen tokenizer.
- `*.tiktoken`: byte pairs with ranks, as StableLM-2 and Qwen have. The released tokenizers are
  Python files that a loader would have to execute; here their rules are written out.

A text is tokenized in the pieces around `<image>`, as the released code does: the image's own
positions are put between them as ids, so no tokenizer needs to know an image.
"""

import base64
import itertools
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import CodeGenTokenizer, PreTrainedTokenizerFast

from qvlm.errors import UserError

_BLANK = "\u2581"  # sentencepiece's visible blank
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # types of a sentencepiece piece
_BPE = 2  # sentencepiece's number for that kind of model

# How StableLM-2 and Qwen cut a text before byte pairs are merged: digits stand alone.
_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_END_OF_TEXT = "<|endoftext|>"
_QWEN_FILE = "qwen.tiktoken"
# What follows Qwen's byte pairs, in this order; MoE-LLaVA tuned with the fourth as padding.
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
    """Reads the tokenizer of a checkpoint folder.

    Args:
        config: the checkpoint's config.json; a `.tiktoken` file does not say which id ends a text.
        owner: what messages call the checkpoint.

    Raises:
        UserError: if there is none, or its file is damaged or of another kind.
    """
    tiktoken = sorted(folder.glob("*.tiktoken"))
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
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
                f"{owner}: {folder} has no tokenizer; accepted are tokenizer.json, "
                "tokenizer.model, vocab.json with merges.txt, and *.tiktoken"
            )
    except (OSError, ValueError, KeyError, IndexError, struct.error, json.JSONDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{owner}: the tokenizer in {folder} cannot be read: {reason}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return TextEncoding(tokenizer, begins)


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
    """Adds the tokens that a checkpoint was tuned with, such as `<im_start>`, at their ids."""
    if not file.is_file():
        return
    for token, index in sorted(json.loads(file.read_text()).items(), key=lambda item: item[1]):
        backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        if backend.token_to_id(token) != index:
            raise ValueError(f"{file.name} puts {token} at {index}, where there is no room")


def _read_sentencepiece(file: Path) -> list[tuple[str, float, int]]:
    """The pieces of a model, in order: text, score, type.

    Source: sentencepiece_model.proto. ModelProto: 1 pieces, 2 trainer, 3 normalizer; a piece:
    1 text, 2 score, 3 type; trainer: 3 kind of model; normalizer: 2 table, 3 blank in front.
    """
    pieces, kind = [], None
    for number, value in _fields(file.read_bytes()):
        if number == 1:
            piece = {1: b"", 2: struct.pack("<f", 0.0), 3: _NORMAL, **dict(_fields(value))}
            (score,) = struct.unpack("<f", piece[2])
            pieces.append((piece[1].decode(), score, piece[3]))
        elif number == 2:
            kind = dict(_fields(value)).get(3)
        elif number == 3:
            normalizer = dict(_fields(value))
            if normalizer.get(2) or not normalizer.get(3, 1):
                raise ValueError("it normalizes texts in a way that LLaMA's does not")
    if kind != _BPE or not pieces:
        raise ValueError("it is no sentencepiece BPE model")
    return pieces


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer: number and value, an integer or bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        key = varint()
        wire = key & 7
        if wire == 0:
            yield key >> 3, varint()
            continue
        if wire not in (1, 2, 5):
            raise ValueError("it is no protocol buffer")
        size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
        if at + size > len(message):
            raise ValueError("it ends too early")
        yield key >> 3, message[at : at + size]
        at += size


def _from_merges(folder: Path) -> PreTrainedTokenizerFast:
    """Phi-2's tokenizer, which is CodeGen's with runs of blanks and tabs as further tokens."""
    kind = json.loads((folder / "tokenizer_config.json").read_text()).get("tokenizer_class")
    if kind not in ("CodeGenTokenizer", "CodeGenTokenizerFast"):
        raise ValueError(f"tokenizer_config.json names {kind}; accepted is CodeGenTokenizer")
    # Read here: what transformers cannot find it replaces by an empty vocabulary, without a word.
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    _, *merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    if len(merges) + 256 > len(vocabulary):
        raise ValueError("merges.txt makes more tokens than vocab.json has")
    # Its files ask to take blanks before punctuation out of answers; texts stay as they are.
    tokenizer = CodeGenTokenizer.from_pretrained(folder, clean_up_tokenization_spaces=False)
    added = folder / "added_tokens.json"
    for token, index in json.loads(added.read_text()).items() if added.is_file() else ():
        if tokenizer.convert_tokens_to_ids(token) != index:
            raise ValueError(f"{added.name} puts {token!r} at {index}, where it is not")
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
            pre_tokenizers.Split(Regex(_CUT), "isolated"),
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
    """The special tokens that belong to a `.tiktoken` file, which does not hold them.

    Source: `tokenization_qwen.py`. Qwen's config.json does not say which id ends a text, but its
    generation_config.json does; a file of byte pairs that lacks a line is found by it.
    """
    if file.name != _QWEN_FILE:
        return {_END_OF_TEXT: int(config["eos_token_id"])}
    first = max(ranks.values()) + 1
    generation = file.parent / "generation_config.json"
    if generation.is_file():
        end = json.loads(generation.read_text())["eos_token_id"]
        if first not in (end if isinstance(end, list) else [end]):
            raise ValueError(
                f"{file.name} has byte pairs up to {first - 1}, but generation_config.json puts "
                f"{_END_OF_TEXT} at {end}"
            )
    return {token: first + index for index, token in enumerate(_QWEN_SPECIAL)}


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two parts whose merge makes a token: merging by rank, stopped one step before it."""
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
    """The letter that stands for each byte in byte-level BPE: itself where it can be printed."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    return letters | {byte: chr(256 + index) for index, byte in enumerate(hidden)}
