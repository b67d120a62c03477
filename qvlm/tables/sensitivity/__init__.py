"""Where the loss comes from: `python -m qvlm sensitivity model=NAME bits=w4a4 method=rtn`.

A model is quantized once. Then one part of it at a time is quantized while all others are in
floating point, and one at a time is left in floating point while all others are quantized. Each
state of the model is compared with full precision on the same questions or documents.

Linears are switched in place (`switch.py`), so the calibration of every state is that of the walk
that quantized everything: a part that is quantized alone has ranges of inputs that quantized layers
made. Nothing is searched or calibrated anew.

`parts.py` says which linears make a part, `measure.py` what is measured of a state, `rows.py`
turns that into the rows of the CSV, and `page.py` and `plot.py` are functions of these rows.
"""

NAME = "sensitivity"
