import copy
import math

import pytest
import torch

from gblr_plugin.compression.inputs import IGNORED, DataReader, kind_of
from gblr_plugin.compression.quality import measure_quality
from gblr_plugin.huggingface.pretrained import load_dense


def changed(model, by):
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return other


def read(folder, path):
    model = load_dense(folder, "test")
    kind = kind_of(model)
    return model, kind, DataReader(folder, kind, length=None if kind == "images" else 16).read(path, "--eval")


METRICS = {
    "encoder": "cosine",
    "classes": "agreement",
    "images": "agreement",
    "decoder": "perplexity",
    "masked": "masked perplexity",
}


@pytest.mark.parametrize(("name", "metric"), METRICS.items())
def test_the_measure_of_each_kind(dense_folder, data, name, metric):
    model, kind, batches = read(dense_folder(name), data(name, count=40))
    same, near, far = (measure_quality(kind, model, changed(model, by), batches) for by in (0.0, 0.005, 1.0))
    assert same.metric == metric
    assert same.after == pytest.approx(same.before, rel=1e-5)
    assert abs(near.after - near.before) <= abs(far.after - far.before)
    assert far.after != pytest.approx(far.before, rel=1e-2)
    if metric == "cosine":
        assert same.others == {"nearest neighbours": {"before": 1.0, "after": 1.0}}
        assert far.others["nearest neighbours"]["after"] < 0.5


def test_perplexity_is_that_of_the_models_own_loss(dense_folder, data):
    model, kind, batches = read(dense_folder("decoder"), data("decoder", count=40))
    batches = [{name: tensor[:4] for name, tensor in batches[0].items()}]
    expected = math.exp(model(**batches[0]).loss.item())
    assert measure_quality(kind, model, model, batches).before == pytest.approx(expected, rel=1e-5)


def test_masked_perplexity_is_that_of_the_masked_tokens(dense_folder, data):
    model, kind, batches = read(dense_folder("masked"), data("masked", count=8))
    logits = model(**{name: t for name, t in batches[0].items() if name != "labels"}).logits
    labels = batches[0]["labels"]
    chosen = labels != IGNORED
    right = logits[chosen].log_softmax(-1).gather(1, labels[chosen][:, None])
    assert measure_quality(kind, model, model, batches).after == pytest.approx(math.exp(-right.mean().item()), rel=1e-5)


def test_padding_does_not_count(dense_folder, data):
    model, kind, batches = read(dense_folder("encoder"), data("encoder", count=6))
    padded = []
    for batch in batches:
        more = {name: torch.nn.functional.pad(tensor, (0, 3)) for name, tensor in batch.items()}
        padded.append(more)
    other = changed(model, 0.1)
    plain, filled = (measure_quality(kind, model, other, b) for b in (batches, padded))
    assert plain.after == pytest.approx(filled.after, abs=1e-5)
