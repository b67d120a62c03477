"""What a config.json says, in one form for all families: the `Blueprint`.

Each family reads its own keys through `Facts` and returns a `Blueprint`. A key that is absent gets
the default of the family's own code, not ours. A value that we do not support is refused.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig, PretrainedConfig

from qvlm.errors import UserError
from qvlm.models.llava import LlavaArchitecture, image_token_count

Renamings = tuple[tuple[str, str], ...]
"""Regular expressions for tensor names and their replacements, applied in order."""

TOWER_NAMES: Renamings = ((r"^vision_model\.", "model.vision_tower."),)


@dataclass(frozen=True)
class Blueprint:
    """The facts of a checkpoint's config.json.

    Attributes:
        text: Configuration of the language model.
        projector_type: Type of the projector, "linear" or "mlp2x_gelu".
        vision_layer: Index of the tower's layer whose features are used.
        renamings: Patterns of the checkpoint's tensor names and the names in our classes.
        vision_width: Width of the image features; None where config.json does not state it.
        class_token: Whether the features include the class token.
        vision_tower: Repository or folder of the tower that config.json names.
        vision: Configuration of the tower; None where only the tower's own repository has it.
        image_token_id: Id of `<image>`; None where the vocabulary has no such token.
        image_fit: How an image becomes square, "crop" or "pad".
        image_text: Text that stands for an image in a prompt.
        projector_act: Activation function of a two-layer projector.
        projector_bias: Whether the projector has biases.
    """

    text: PretrainedConfig
    projector_type: str
    vision_layer: int
    renamings: Renamings
    vision_width: int | None = None
    class_token: bool = False
    vision_tower: str | None = None
    vision: CLIPVisionConfig | None = None
    image_token_id: int | None = None
    image_fit: str = "crop"
    image_text: str = "<image>"
    projector_act: str = "gelu"
    projector_bias: bool = True

    def architecture(self, vision: CLIPVisionConfig, owner: str) -> LlavaArchitecture:
        """Combines the language model and the projector with a vision tower.

        Raises:
            UserError: If the tower is not as wide as the projector expects.
        """
        if self.vision_width not in (None, vision.hidden_size):
            raise UserError(
                f"{owner}: config.json expects image features of width {self.vision_width}, but "
                f"the vision tower has width {vision.hidden_size}. Set model.vision_tower to a "
                f"copy of {self.vision_tower}."
            )
        strategy = "full" if self.class_token else "default"
        return LlavaArchitecture(
            vision_config=vision,
            text_config=self.text,
            # The id lies beyond the vocabulary where that has no such token: see
            # `PlaceholderEmbedding`.
            image_token_index=(
                self.text.vocab_size if self.image_token_id is None else self.image_token_id
            ),
            image_seq_length=image_token_count(vision, strategy),
            vision_feature_layer=self.vision_layer,
            vision_feature_select_strategy=strategy,
            projector_type=self.projector_type,
            projector_hidden_act=self.projector_act,
            multimodal_projector_bias=self.projector_bias,
            tie_word_embeddings=bool(self.text.tie_word_embeddings),
        )


class Facts:
    """The keys of a config.json, or of an object in it, with errors that name the checkpoint.

    Args:
        content: Object to read.
        owner: Name of the checkpoint in messages.
    """

    def __init__(self, content: Mapping[str, Any], owner: str) -> None:
        self._content = content
        self._owner = owner

    def need(self, key: str) -> Any:
        """Returns a value that must be there.

        Raises:
            UserError: If the key is absent or null.
        """
        if self._content.get(key) is None:
            raise UserError(
                f"{self._owner}: config.json lacks {key}, which its model family needs. "
                "Give the config.json that belongs to the weights."
            )
        return self._content[key]

    def get(self, key: str, default: Any) -> Any:
        """Returns a value, or the default where the key is absent or null."""
        value = self._content.get(key)
        return default if value is None else value

    def section(self, key: str) -> "Facts":
        """Returns the facts of an object inside this one."""
        return Facts(self.need(key), f"{self._owner}, {key}")

    def refuse_unless(self, key: str, value: Any, accepted: tuple[Any, ...]) -> Any:
        """Returns a value that is among the accepted ones.

        Raises:
            UserError: If it is not.
        """
        if value not in accepted:
            raise UserError(
                f"{self._owner}: {key} {value!r} in config.json is not supported. "
                f"Choose one of: {', '.join(map(repr, accepted))}."
            )
        return value


def read_config(folder: Path, owner: str) -> dict[str, Any]:
    """Reads the config.json of a folder.

    Raises:
        UserError: If the file is missing or is not a JSON object.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{owner}: {file} is missing. A checkpoint folder holds a config.json.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{owner}: {file} is not JSON ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{owner}: {file} is not a JSON object. Download it again.")
    return content


def vision_config(content: Mapping[str, Any]) -> CLIPVisionConfig:
    """Reads a CLIP tower from its repository's config.json, or from a part of one.

    Raises:
        UserError: If it describes a tower of another kind.
    """
    kind = content.get("model_type")
    if kind not in (None, "clip", "clip_vision_model"):
        raise UserError(
            f"the vision tower's config.json describes a {kind}, which is not supported. "
            "Give a CLIP vision tower."
        )
    return CLIPVisionConfig.from_dict(dict(content.get("vision_config") or content))


def rename(name: str, renamings: Renamings) -> str:
    """Returns the name that a checkpoint's tensor has in our classes."""
    for pattern, replacement in renamings:
        name = re.sub(pattern, replacement, name)
    return name


def split(name: str) -> list[str]:
    """Returns the parameters that a renamed tensor fills.

    Each parameter takes an equal share of the tensor's rows, in order. Only Qwen's `c_attn` fills
    more than one: query, key and value.
    """
    if ".qkv_proj." not in name:
        return [name]
    return [name.replace(".qkv_proj.", f".{part}_proj.") for part in "qkv"]
