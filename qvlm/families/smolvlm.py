"""SmolVLM: Idefics3 in small."""

from dataclasses import replace

from qvlm.families.idefics3 import IDEFICS3

SMOLVLM = replace(IDEFICS3, model_type="smolvlm", title="SmolVLM")
