"""Tables: pure functions of the records, shown beside what the paper prints.

`table2` is the command. `selection` decides which records a table may show, `comparison` compares
methods question by question, `report` writes Markdown, `published` holds the paper's numbers.
Nothing here runs a model, and nothing of the paper is ever counted as ours.
"""
