"""One cell: a model quantized by one method to one bit width, evaluated and recorded.

Open `pipeline` first: it is the line that every cell runs through. `identity` says which record a
cell has, and `checks` refuses a wrong option before anything is read. `inputs` and `method` make
what the line works with, `findings` holds what it finds, and `streaming` quantizes a model that is
larger than memory. Only `qvlm.planning`, `qvlm.sweep`, `qvlm.tables`, `qvlm.cli` and the
experiments may import this folder. It may import every folder except these.
"""
