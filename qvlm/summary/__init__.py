"""What a command prints at its end: the numbers of a cell, or the comparison of a sweep's cells.

Both are functions of records, like tables, and check them by the rules of tables. They show what
was run, whatever the experiment; `qvlm.tables` decides what may stand side by side on a page.

rich draws the tables: with lines and colors on a terminal, and as plain text elsewhere.
"""

from qvlm.summary.cell import cell_summary
from qvlm.summary.parts import find_reference
from qvlm.summary.printing import print_summary
from qvlm.summary.sweep import sweep_summary

__all__ = ["cell_summary", "find_reference", "print_summary", "sweep_summary"]
