"""The report: one HTML file that shows what the records of a folder say.

`python -m qvlm report` writes `results/report/index.html`. The file needs no network and no server.
`content.py` gathers what is shown and `page.py` fills the template in `assets/`; start with these
two. `verdicts.py`, `tables.py`, `charts.py`, `losses.py`, `sensitivity.py`, `costs.py`,
`proof.py` and `questions.py` make one part of the page each. Everything here is a function of
records, and of the CSV of two pages beside them; nothing is run.
"""
