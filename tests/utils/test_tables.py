from gblr_plugin.utils.tables import aligned, table


def test_cells_of_a_column_stand_below_each_other():
    assert aligned([["a", "12", "x"], ["name", "3", ""]], left=(0, 2)) == ["a     12  x", "name   3"]
    assert aligned([["1", "22"]], left=(), gap=" | ") == ["1 | 22"]


def test_rules_stand_below_the_header_and_above_the_total():
    found = table(["layer", "n"], [["fc", "7"], ["proj", "5"]], total=["all", "12"])
    assert found == ["layer   n", "---------", "fc      7", "proj    5", "---------", "all    12"]
    assert table(["layer", "n"], []) == ["layer  n", "--------"]
