"""SmolVLM: Idefics3 in small. Its own processor adds video only, and needs num2words for that."""

from dataclasses import replace

from qvlm.families.idefics3 import IDEFICS3

SMOLVLM = replace(IDEFICS3, model_type="smolvlm", title="SmolVLM", processor="idefics3")
