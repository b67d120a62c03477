"""What a cell on plain text works with: rows to calibrate on, windows to score, the reference."""

import random

import torch
from torch import Tensor

from qvlm.cell import references
from qvlm.config.schema import RunConfig
from qvlm.data.text import Document, load_documents
from qvlm.errors import UserError
from qvlm.evaluation.states import SavedStates, read_states
from qvlm.evaluation.text import Window, refer, windows_of
from qvlm.models.loaded import LoadedModel

PROOF_TOKENS = 128


def load_texts(config: RunConfig) -> list[Document]:
    """Loads the documents to score.

    Raises:
        UserError: If they cannot be loaded.
    """
    return load_documents(config.data.source, config.data.split, config.evaluation.limit)


def score_windows(
    config: RunConfig, loaded: LoadedModel, documents: list[Document]
) -> list[Window]:
    """Cuts the documents of a cell into windows.

    Raises:
        UserError: If a document has no token.
    """
    windows = windows_of(loaded, documents, config.evaluation.window)
    if not windows:
        raise UserError("data: the documents hold no token. Give other texts.")
    return windows


def draw_rows(config: RunConfig, loaded: LoadedModel) -> tuple[list[dict[str, Tensor]], list[int]]:
    """Draws calibration rows: stretches of text that begin with the bos token.

    The documents of the split are cut into stretches of `calibration.tokens` - 1 tokens, of which
    `calibration.samples` are drawn without replacement.

    Returns:
        Batches of `calibration.batch_size` rows, and the numbers of the stretches, ascending.

    Raises:
        UserError: If the split has fewer stretches.
    """
    calibration, tokenizer = config.calibration, loaded.tokenizer
    stretches: list[list[int]] = []
    for document in load_documents(config.data.source, calibration.split):
        ids = tokenizer(document.text, add_special_tokens=False)["input_ids"]
        width = calibration.tokens - 1
        stretches += [ids[i : i + width] for i in range(0, len(ids) - width + 1, width)]
    if calibration.samples > len(stretches):
        raise UserError(
            f"calibration.samples={calibration.samples} is more than split {calibration.split} "
            f"has: {len(stretches)} stretches of calibration.tokens={calibration.tokens}. Give a "
            "smaller number."
        )
    drawn = random.Random(calibration.seed).sample(range(len(stretches)), calibration.samples)
    drawn.sort()
    rows = torch.tensor([[tokenizer.bos_token_id, *stretches[number]] for number in drawn])
    device = loaded.model.device
    batches = [
        {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
        for ids in rows.split(calibration.batch_size)
    ]
    return batches, drawn


def proof_rows(windows: list[Window], loaded: LoadedModel) -> list[dict[str, Tensor]]:
    """Makes a batch of the first window's tokens, to count levels on."""
    ids = torch.tensor([windows[0].passage.ids[:PROOF_TOKENS]]).to(loaded.model.device)
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]


def reference_of(
    config: RunConfig, files_hashed: dict[str, str], loaded: LoadedModel, windows: list[Window]
) -> SavedStates | None:
    """Returns what the model in full precision makes of the windows.

    It is computed once for all cells of a results folder. A model that is streamed cannot compute
    it and takes what another cell left. A checkpoint that was packed before does not say which
    weights it was made of, so that nothing can be compared with it.

    Args:
        config: Configuration of the cell.
        files_hashed: Hashes that identify the model; see `Cell`.
        loaded: Model in full precision or, if the cell is given a packed one, packed.
        windows: Windows to score.
    """
    if config.model.packed is not None:
        return None
    file = references.file_of(config, files_hashed, [window.passage for window in windows])
    return read_states(file) if config.stream else refer(loaded, windows, file)
