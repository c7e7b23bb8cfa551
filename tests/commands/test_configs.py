import json

import pytest

from gblr_plugin.commands.configs import locate, read
from gblr_plugin.run.settings import RunSettings


@pytest.mark.parametrize(("command", "required"), [("run", "task"), ("compare", "budgets"), ("search", "space")])
def test_help_config_prints_the_schema(call, command, required):
    code, out, err = call(command, "--help-config")
    assert (code, err) == (0, "")
    schema = json.loads(out)
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert required in schema["required"]


def test_a_config_with_its_overrides(config):
    settings = read(locate(config, ["dense.lr=0.5", "methods.0.name=low_rank"]), RunSettings)
    assert (settings.dense.lr, settings.methods[0].name) == (0.5, "low_rank")
