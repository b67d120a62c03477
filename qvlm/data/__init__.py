"""Problems with ScienceQA's schema, as data and as text.

Open `scienceqa` first: `load_scienceqa` gives the problems of a split. `sources` reads the formats
that a data set comes in, `validation` checks rows, `images` decodes them, `prompts` turns a problem
into text and a text into a choice, and `miniature` generates problems. Nothing here imports another
folder of `qvlm`.
"""
