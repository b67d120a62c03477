"""One cell: a model quantized by one method at one bit width, evaluated and recorded.

`pipeline` is the line that every cell runs through. `identity` says which record a cell has,
`inputs` makes what the line works with, and `streaming` serves models larger than memory.
"""
