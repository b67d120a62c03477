"""What packed models take on a GPU: `make gpu`, prepared so that a few minutes of one suffice.

`python -m qvlm.tables.gpu` measures models with random weights, because time and memory do not
depend on their values. In this order, the most important first:

1. `limits`: how fast this card copies, and multiplies in bf16 and int8;
2. `correctness` and `tiles`: the products of every packed form against float64 on the shapes of
   LLaVA-13B, as a share of `accumulation_bound`, and the tiles that are fastest on this card;
3. `models`: whole LLaVA-13B and 7B, in bf16 and packed, with one and with 16 sequences. All forms,
   bf16 included, run in `qvlm.packing.decoder`, replayed as CUDA graphs;
4. `miniatures`: whether the embedded models answer on the GPU as on the CPU;
5. `methods`: how long calibration and search of a 13B take, extrapolated from a few of its layers.

Each task appends its lines to `gpu.csv` when it is done, and is skipped if they are there, so the
command can be stopped and continued anywhere. `page`, with `goals` and `whole_models`, makes
`gpu.md` of that file alone, and `--page` does only that. `--minutes` is a budget after which no
further task begins. `--dry-run` does everything in miniature sizes on a CPU, with
TRITON_INTERPRET=1.

The prompts are ScienceQA's mix (`forms.py`) and, for comparison, 600 tokens with an answer of 64.
Start with `__main__`.
"""
