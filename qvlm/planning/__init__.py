"""What cells need before they run: memory, files and hours.

- `footprint`: the predictor of memory, and the command that prints it. Open this first.
- `measured`: measured memory, to compare with the predictions.
- `preflight`: the page of `preflight=true`, with `estimates` (memory of a whole cell), `timing`
  (hours) and `sources` (files).

Nothing is downloaded, and weights are not loaded. These modules may import everything that a cell
is made of. Only the command line, the sweep and the tables import them.
"""
