import argparse

import pytest

from gblr_plugin.utils.arguments import OneLineParser, add_command, common_flags, positive


def parser_with(*names, **options):
    parser = OneLineParser(prog="gblr")
    commands = parser.add_subparsers(parser_class=OneLineParser)
    flags = common_flags(*names, **options)
    add_command(commands, "do", "do it", lambda _: None, flags=flags, examples=["gblr do --debug"])
    return parser


def test_a_command_has_the_flags_that_it_names_and_debug():
    parser = parser_with("json", "quiet", output="default: here")
    given = parser.parse_args(["do", "--json", "-q", "--output", "out", "--debug"])
    assert (given.json, given.quiet, given.debug, given.output.name) == (True, True, True, "out")
    with pytest.raises(SystemExit):
        parser.parse_args(["do", "--fresh"])


def test_an_output_may_be_needed(capsys):
    with pytest.raises(SystemExit):
        parser_with(output="the file", required=True).parse_args(["do"])
    assert capsys.readouterr().err.count("\n") == 1


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit):
        parser_with().parse_args(["do", "--help"])
    shown = capsys.readouterr().out
    assert shown.endswith("examples:\n  gblr do --debug\n")
    assert "\nDo it.\n" in shown


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", ""])
def test_positive(text):
    assert positive("12") == 12
    with pytest.raises(argparse.ArgumentTypeError, match="must be a whole number of at least 1"):
        positive(text)
