import json
import math


def test_a_model_of_language_alone_and_beside_the_dense_one(call, decoder, texts):
    dense, half = decoder
    alone = json.loads(call("eval", half, "--eval", texts, "--length", "8", "--json")[1])
    beside = json.loads(call("eval", half, "--against", dense, "--eval", texts, "--length", "8", "--json")[1])
    assert alone["metric"] == "perplexity"
    assert math.isclose(alone["value"], beside["value"], rel_tol=1e-6)
    assert alone["dense"] is None
    of_dense = json.loads(call("eval", dense, "--eval", texts, "--length", "8", "--json")[1])
    assert math.isclose(of_dense["value"], beside["dense"], rel_tol=1e-6)
    code, out, err = call("eval", half, "--eval", texts, "--length", "8", "--samples", "5", "--threads", "1")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].split() == ["measure", "model"]
    assert "over 5 samples" in out


def test_misuse(call, decoder, texts):
    dense, _ = decoder
    for arguments, message in (
        ([dense, "--eval", "nothing.txt"], "--eval: no file at 'nothing.txt'"),
        ([dense, "--eval", texts, "--length", "400"], "--length must be at most the model's 16 tokens"),
        (["nowhere", "--eval", texts], "eval: no folder at 'nowhere'"),
    ):
        code, out, err = call("eval", *arguments)
        assert (code, out) == (2, ""), arguments
        assert message in err
