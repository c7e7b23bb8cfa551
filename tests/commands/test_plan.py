import json

import pytest

from gblr_plugin.run.counting import count_config
from gblr_plugin.run.settings import RunSettings


def test_a_config(call, config):
    code, out, err = call("plan", config)
    assert (code, err) == (0, "")
    assert "planned" in out
    assert "patch: the config does not ask for it" in out
    counted = count_config(RunSettings("digits_vit", 0.25, model={"dim": 16, "depth": 1, "heads": 2, "held_out": 0.5}))
    assert json.loads(call("plan", config, "--set", "budget=0.25", "--json")[1]) == json.loads(counted.to_json())


def test_a_model(call, decoder):
    dense, _ = decoder
    code, out, err = call("plan", dense, "--budget", "0.25", "--exclude", "*c_attn")
    assert (code, err) == (0, "")
    assert "compressed layers: 25.00% of their dense multiply-adds" in out
    assert "c_attn: it was not asked for" in out
    layers = json.loads(call("plan", dense, "--json", "--length", "4")[1])["layers"]
    by_name = {layer["name"]: layer for layer in layers}
    assert by_name["transformer.h.0.mlp.c_fc"]["dense_multiply_adds"] == 4 * 32 * 128
    assert by_name["transformer.h.0.mlp.c_fc"]["relative_flops"] == 0.5
    assert by_name["lm_head"]["left_dense"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["config.yaml", "--budget", "0.5"], "plan: --budget is for a model; a config has its own, see --set"),
        (["nowhere", "--set", "a=b"], "plan: --set is for a config"),
        (["nowhere", "--budget", "2"], "--budget must be relative FLOPs in (0, 1], got 2.0"),
        (["nowhere"], "plan: no folder at 'nowhere', and no model of this name in the local cache"),
    ],
)
def test_misuse(call, config, arguments, message):
    code, out, err = call("plan", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"gblr: {message}")
    assert err.count("\n") == 1
