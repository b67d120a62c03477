"""`qvlm export FOLDER`: a packed checkpoint in a format that other engines load.

`compressed_tensors.py` says what one layer becomes and refuses what the format has no words for,
`folder.py` writes the checkpoint. Neither needs the library of the format.
"""
