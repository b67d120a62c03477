"""Families of checkpoints: ways to write config.json and to name tensors, one file for each.

- `llava`: the checkpoints of LLaVA's authors.
- `moe_llava`: the checkpoints of MoE-LLaVA's authors.
- `transformers_llava`: the copies in transformers' format.

Start with `blueprint`, which holds what they have in common. `read_blueprint` finds the family.
"""

from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from qvlm.errors import UserError
from qvlm.models.checkpoints.families import llava, moe_llava, transformers_llava
from qvlm.models.checkpoints.families.blueprint import (
    TOWER_NAMES,
    Blueprint,
    Facts,
    Renamings,
    read_config,
    rename,
    split,
    vision_config,
)
from qvlm.models.checkpoints.families.transformers_llava import OWN_NAMES

__all__ = [
    "OWN_NAMES",
    "TOWER_NAMES",
    "Blueprint",
    "Renamings",
    "read_blueprint",
    "read_config",
    "rename",
    "split",
    "vision_config",
]


def read_blueprint(content: Mapping[str, Any], owner: str) -> Blueprint:
    """Reads the facts of a config.json, whichever family wrote it.

    Args:
        content: Content of config.json.
        owner: Name of the checkpoint in messages.

    Raises:
        UserError: If no family has this architecture, or a fact is missing or not supported.
    """
    try:
        return _read(content, Facts(content, owner), owner)
    except (TypeError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{owner}: config.json does not describe a model: {reason}") from error


def _read(content: Mapping[str, Any], facts: Facts, owner: str) -> Blueprint:
    kind = (content.get("architectures") or [content.get("model_type")])[0]
    if "text_config" in content and "vision_config" in content:
        return transformers_llava.read_transformers_llava(content, facts)
    if kind in llava.KINDS:
        return llava.read_llava(facts)
    if kind in moe_llava.KINDS:
        return moe_llava.read_moe_llava(facts, kind)
    known = (llava.ARCHITECTURE, *moe_llava.ARCHITECTURES, transformers_llava.ARCHITECTURE)
    known += (transformers_llava.LANGUAGE_MODEL,)
    raise UserError(
        f"{owner}: the architecture {kind} in config.json is not known. "
        f"Choose one of: {', '.join(known)}."
    )
