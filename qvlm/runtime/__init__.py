"""What a cell runs in: the ranks that work on it and the stages that are measured.

- `workers`: several processes that evaluate one cell together. Open this first.
- `stages`: a progress bar and the time and memory of each stage.
- `processes`: a function call in a process of its own.
- `precision`: which floating-point type the CPU multiplies fast.

These modules know nothing of models, methods or records and import only `qvlm.errors`.
"""
