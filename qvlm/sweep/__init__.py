"""The cells of a sweep: in what order they run, and where.

`plan` turns the combinations of a sweep into checked cells. `launch` builds the launcher that
`launcher=NAME` names and runs cells with it; there is a file for each family: `local`, `slurm` and
`ray`. `job` holds what they share, the job as another process runs it. Modules here import PyTorch
only inside functions, so that a mistyped option is answered at once.
"""
