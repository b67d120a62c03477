"""Checkpoints on disk and on the hub: configuration, weights and tokenizer.

All are read without any code of theirs. `original` reads the checkpoints of LLaVA's and MoE-LLaVA's authors, `own` those in our format. Both
return a `Checkpoint`. They use `families` for config.json, `weights` and `tensors` for the weights,
`tokenizer` for the tokenizer and `hub` for downloads. Nothing here knows of quantization.
"""
