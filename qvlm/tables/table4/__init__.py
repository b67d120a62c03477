"""Table 4 on the miniatures: what a packed model costs, and what it answers.

`make table4` runs the cells of `experiment=table4`, whose accuracy comes from packed execution and
whose checkpoints are written to `results/packed`, and then `python -m qvlm.tables.table4`, which
measures each checkpoint.

- Time is measured side by side in one process. Full precision and every packed model of one
  architecture answer the same questions in turn, one question at a time, `--repeats` times. A ratio
  compares two models within a repeat, and its spread is over the repeats.
- Agreement is the share of questions of the whole split on which packed execution chose the same
  answer as simulated execution, where such a cell is recorded too.
- Memory is measured in a fresh process per model, which loads it and answers the same questions.
  It is the peak resident set, or the peak of the allocator on a GPU.

Full precision is bfloat16, 16 bits as in the paper. Simulated execution is not timed, because its
time and memory say nothing about a packed model.

`subjects` finds the models to measure, `measure` times and weighs them, `page` writes the Markdown.
Start with `__main__`.
"""
