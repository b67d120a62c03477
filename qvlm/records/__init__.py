"""What a cell leaves behind: its record, and everything that protects and shows it.

- `record`: the folder that holds a cell's numbers, and how records are found. Open this first.
- `files`: the one way in which this project writes files, whole or not at all.
- `locks`: one process at a time per cell, on one machine or several.
- `tracking`: Weights & Biases.
- `environment` and `provenance`: versions, hardware, and the version of the code.

Every folder may import `files`. These modules import `qvlm.bits`, `qvlm.config`, `qvlm.data`
and `qvlm.errors` only.
"""
