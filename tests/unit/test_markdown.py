"""Markdown tables read well as text, too."""

from qvlm.markdown import table


def test_markdown_columns_line_up_and_pipes_are_escaped() -> None:
    lines = table(["a", "b|c"], [["long cell", "1"], ["|", "22"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0] == "| a         | b\\|c |"
    assert lines[1] == "| :-------- | ---: |"
    assert lines[3] == "| \\|        |   22 |"
