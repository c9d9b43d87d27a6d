"""The one printer of tables."""

from dho2_jax.app.show import table

ROWS = [("name", "size", "of"), ("a", "12"), ("longer", "3", "4567")]


def test_columns_are_as_wide_as_their_widest_cell():
    assert table.lines(ROWS) == [
        "name    size    of",
        "a         12",
        "longer     3  4567",
    ]
    assert table.lines(ROWS, "rl")[1] == "     a  12"
    assert table.lines([]) == []


def test_a_rule_below_the_first_row():
    first, rule, *others = table.ruled(ROWS, "llr")
    assert [first, *others] == table.lines(ROWS, "llr")
    assert rule == "-" * 18


def test_markdown():
    assert table.markdown([("a", "b"), ("1", "2")]) == [
        "| a | b |",
        "| --- | --- |",
        "| 1 | 2 |",
    ]
