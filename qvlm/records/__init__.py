"""What a cell leaves behind: its record, and everything that protects and shows it.

- `record`: the folder that holds a cell's numbers, and how records are found. Open this first.
- `files`: the one way in which this project writes files, whole or not at all.
- `locks`: one process at a time per cell, on one machine or several.
- `tracking`: Weights & Biases.

Everybody may import `files`; these modules import `qvlm.bits`, `qvlm.config`, `qvlm.data` and
`qvlm.errors` only.
"""
