"""Tables: what the records say, with the paper's numbers in rows of their own.

`table1`, `table2`, `table5`, `table6` and `claims` are pure functions of records. `table4` and
`table4_scale` also measure packed models, and `outliers`, `sensitivity` and `peers` need no record.
Each is a command, `python -m qvlm.tables.NAME`. Open `table2` first.

`selection` and `proof` decide which records a table may show, `comparison` tests whether methods
differ, `report` has the parts that pages share, `command` the options that commands share, `labels`
the names and the order of methods, and `published` the paper's numbers.

Only `qvlm.summary`, `qvlm.report` and commands import these modules.
"""
