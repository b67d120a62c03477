"""Table 4 at full scale without the weights: time and memory do not depend on their values.

`python -m qvlm.tables.table4_scale` builds the true architectures with random weights. Blocks
(layers of the vision tower, the projector, decoder layers) are made one after the other. The first
block of a shape is drawn, quantized and packed, and the others are copies of its bytes. Two things
are measured.

- Side by side, in one process: models with a layer of each shape, in bf16, in each packed form and
  in bitsandbytes' NF4, take the same prompt in turn, `--repeats` times. The ratios come from these.
- Whole models, in a fresh process per form: all layers, for the peak of memory and the time.

A question is an image and text of 600 tokens together, and an answer of 64 tokens, of which a few
are timed (fewer where they are slow). The time of each layer is measured separately. A model of
which only some layers ran takes what these took and, for each missing layer, what one of its shape
took. It is marked as extrapolated. So are a whole model that would take longer than 20 seconds, and
one that does not fit, whose memory is what `qvlm.planning.footprint` predicts.

It writes `table4_scale.csv`, with the columns of Table 4, and `table4_scale.md`. There is no
accuracy, because the weights are random.

`models` builds the models, `clock` times a question, `whole` weighs a whole model, `measure` makes
the rows, `search` estimates the search of ranges, `page` writes the Markdown.
Start with `__main__`.
"""
