"""The configuration of a cell.

Open `schema` first: every option, as dataclasses. `compose` is what Hydra needs to fill them from
the YAML files of `conf/`, and `explain` turns Hydra's refusals into one sentence. Nothing here
imports PyTorch. Besides itself this folder imports `qvlm.bits`, `qvlm.validation` and
`qvlm.errors` only.
"""
