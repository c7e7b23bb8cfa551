import pytest
from torch import nn

from gblr_plugin.surgery.heads import output_heads


class Named(nn.Module):
    """Children by name."""

    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class Asked(Named):
    """A model that says what its head is."""

    def __init__(self, answer, method, **children):
        super().__init__(**children)
        self._answer = answer
        setattr(self, method, self._say)

    def _say(self):
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


def linear():
    return nn.Linear(8, 8)


def heads(model):
    found = output_heads(model)
    return [name for name, module in model.named_modules() if id(module) in found]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Named(body=linear(), head=linear()), ["head"]),
        (Named(layer1=nn.Sequential(linear(), linear()), fc=linear()), ["fc"]),
        (Named(network=Named(body=linear(), classifier=linear())), ["network.classifier"]),
        (Named(classifier=nn.Sequential(linear(), nn.ReLU(), linear())), ["classifier.2"]),
        (Named(heads=nn.Sequential()), []),
        (Named(lm_heads=nn.ModuleList([linear(), linear()])), ["lm_heads.0", "lm_heads.1"]),
        (Named(heads=nn.ModuleDict({"a": linear(), "b": linear()})), ["heads.a", "heads.b"]),
        (Named(blocks=nn.ModuleList([Named(head=linear(), score=linear())])), []),
        (Named(fc1=linear(), fc2=linear()), []),
        (nn.Sequential(linear(), linear()), []),
        (Named(decode_head=Named(mix=linear(), last=nn.Conv2d(8, 8, 1))), ["decode_head.last"]),
    ],
)
def test_names(model, expected):
    assert heads(model) == expected


@pytest.mark.parametrize("method", ["get_output_embeddings", "get_classifier"])
def test_a_model_says_what_its_head_is(method):
    a, b = linear(), linear()
    assert heads(Named(inner=Asked(a, method, last=a, other=b))) == ["inner.last"]
    assert heads(Asked((a, b), method, last=a, other=b)) == ["last", "other"]
    assert heads(Asked(None, method, last=a)) == []
    assert heads(Asked(nn.Identity(), method, last=a)) == []
    assert heads(Asked(NotImplementedError(), method, last=a, score=b)) == ["score"]
