"""What the reports of all commands share; their tables are tested with each."""

from gblr_plugin.run.reports import mean_and_spread


def test_mean_and_spread():
    assert mean_and_spread([1.0, 2.0, 6.0]) == (3.0, 2.5)
    assert mean_and_spread([4.0]) == (4.0, 0.0)
