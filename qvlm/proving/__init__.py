"""`qvlm prove CHECKPOINT`: what a quantized checkpoint of any origin really holds.

Start with `proof.py`, which opens a checkpoint, reads its layers and collects what is wrong.
`formats/` has a file for each format, which only says how it stores codes, scales and zero points
(`stored.py`). `checks.py` looks at one layer, `floats.py` at what is left in floating point,
`experts.py` and `copies.py` at several layers together, and `page.py` writes what was found.

No code of a checkpoint runs, and no library of its format is needed. Left out: whether the codes
are those that the float weight asks for. Without that weight nobody can tell.
"""
