"""The families of vision-language models that are served as transformers has them, as data.

Each file holds one table, a `Family`. To add a family, write its file and add its table to
`FAMILIES`; docs/families.md shows how. Nothing here imports anything.
"""

from qvlm.families.family import Family
from qvlm.families.gemma3 import GEMMA3
from qvlm.families.glm4v_moe import GLM4V_MOE
from qvlm.families.idefics3 import IDEFICS3
from qvlm.families.internvl import INTERNVL
from qvlm.families.llava import LLAVA
from qvlm.families.llava_next import LLAVA_NEXT
from qvlm.families.llava_onevision import LLAVA_ONEVISION
from qvlm.families.qwen2_5_vl import QWEN2_5_VL
from qvlm.families.qwen2_vl import QWEN2_VL
from qvlm.families.qwen3_vl import QWEN3_VL
from qvlm.families.qwen3_vl_moe import QWEN3_VL_MOE
from qvlm.families.smolvlm import SMOLVLM

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        *(LLAVA, LLAVA_NEXT, LLAVA_ONEVISION),
        *(QWEN2_VL, QWEN2_5_VL, QWEN3_VL, QWEN3_VL_MOE),
        *(INTERNVL, SMOLVLM, IDEFICS3, GEMMA3, GLM4V_MOE),
    )
}

__all__ = ["FAMILIES", "Family"]
