"""Checkpoints on disk and on the hub: configuration, weights and tokenizer.

`original` reads the checkpoints of LLaVA's and MoE-LLaVA's authors, `own` those in our format. Both
return a `Checkpoint`, and neither runs code that comes with one. `families` reads config.json,
`weights` and `tensors` read the weights, `tokenizer` the tokenizer, and `hub` downloads. Nothing
here imports `qvlm.packing` or quantization.
"""
