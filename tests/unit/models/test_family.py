"""Checkpoints of the families: loaded, asked and refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.smolvlm import processing_smolvlm

from qvlm.data.prompts import CHAT, Prompting
from qvlm.errors import UserError
from qvlm.evaluation.decoding import decode
from qvlm.families import FAMILIES
from qvlm.models import load_model
from qvlm.models.chat import FamilyModel
from tests.helpers.families import (
    load_tiny,
    picture,
    problems,
    tiny_family,
    tiny_tokenizer,
    write_family,
)
