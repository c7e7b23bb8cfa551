import logging

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from gblr_plugin import ConfigError, LayerSettings, convert, prepare
from gblr_plugin.surgery.selection import layer_filter, log_skipped, select_layers
from gblr_plugin.tensor.frozen import FrozenLinear


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(2)])
        self.norm = nn.LayerNorm(16)
        self.tiny = nn.Linear(16, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)


def names(model, include=None, exclude=()):
    return list(select_layers(model, include, exclude).layers)


def test_default_is_every_layer_that_can_gain():
    assert names(Net()) == ["stem", "blocks.0.0", "blocks.0.2", "blocks.1.0", "blocks.1.2"]


@pytest.mark.parametrize(
    ("include", "expected"),
    [
        (["blocks.1.2", "stem"], ["stem", "blocks.1.2"]),
        (["blocks.*"], ["blocks.0.0", "blocks.0.2", "blocks.1.0", "blocks.1.2"]),
        (["Linear"], ["blocks.0.0", "blocks.0.2", "blocks.1.0", "blocks.1.2", "tiny"]),
        (["blocks.?.0"], ["blocks.0.0", "blocks.1.0"]),
    ],
)
def test_names_globs_and_types(include, expected):
    assert names(Net(), include) == expected


def test_exclude_takes_away():
    assert names(Net(), ["Linear"], ["blocks.0.*", "tiny"]) == ["blocks.1.0", "blocks.1.2"]


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        (["stemm"], (), "'stemm' matches no module of the model; did you mean 'stem'"),
        (None, ["blocs.*"], "'blocs.*' matches no module"),
        (["norm"], (), "layer 'norm': a LayerNorm cannot be structured; allowed are Linear"),
        (["blocks"], (), "layer 'blocks': a ModuleList cannot be structured"),
        (["stem", "nor*"], (), "'nor*' matches no layer that can be structured"),
        (["depthwise"], (), "layer 'depthwise': convolution with groups=16: only groups=1"),
        (["stem"], ["Conv2d"], "the selection is empty"),
    ],
)
def test_errors_are_one_line_and_name_the_pattern(include, exclude, message):
    with pytest.raises(ConfigError) as caught:
        select_layers(Net(), include, exclude)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arguments", [("stem",), (None, "stem")])
def test_one_string_is_refused(arguments):
    with pytest.raises(ConfigError, match="is a list of names, glob patterns or types"):
        select_layers(Net(), *arguments)


def test_a_shared_module_is_found_under_any_of_its_names():
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict({"first": shared, "second": shared, "other": nn.Linear(16, 16)})
    assert names(model) == ["first", "other"]
    assert names(model, ["second"]) == ["first"]
    assert names(model, None, ["second"]) == ["other"]


def test_default_passes_over_what_is_structured_converted_or_parametrized():
    model = nn.Sequential(
        nn.Linear(16, 16), nn.Linear(16, 16), weight_norm(nn.Linear(16, 16)), nn.Conv2d(4, 16, 3), nn.Conv1d(4, 16, 3)
    )
    prepare(model, ["0", "3"])
    assert names(model) == ["1", "4"]
    with torch.no_grad():
        for index in (0, 3):
            model[index].widths.mul_(0.3)
    convert(model)
    assert isinstance(model[3], nn.Conv2d)
    assert names(model) == ["1", "4"]


def test_a_model_that_is_itself_a_layer_has_no_layer_inside():
    with pytest.raises(ConfigError, match="inside a model"):
        select_layers(nn.Linear(16, 16))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.ReLU()), "allowed are Linear, Conv1d, Conv2d"),
        (nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2)), "layer '1': convolution with groups=2: only groups=1"),
        (nn.Sequential(nn.Linear(16, 1)), "layer '0': it is too small to gain"),
    ],
)
def test_an_empty_default_selection_says_what_stands_in_the_way(model, reason):
    with pytest.raises(ConfigError, match=f"the selection is empty; {reason}"):
        select_layers(model)


@pytest.mark.usefixtures("structured_plans")
def test_preparing_twice_says_so():
    model = nn.Sequential(nn.Linear(16, 16))
    prepare(model)
    with pytest.raises(ConfigError, match="the selection is empty; layer '0': it is structured already"):
        prepare(model)
    with torch.no_grad():
        model[0].widths.mul_(0.3)
    convert(model)
    with pytest.raises(ConfigError, match="layer '0': its weight is a GBLRTensor, need a plain tensor"):
        prepare(model)


def test_converting_before_preparing_says_so_of_a_layer_that_keeps_its_matrix():
    model = nn.Sequential(nn.Linear(64, 64))
    prepare(model, settings=LayerSettings("trapezoid", budget=0.5))
    convert(model)
    assert type(model[0]) is FrozenLinear
    for include in (None, ["0"]):
        with pytest.raises(ConfigError, match="layer '0': it is converted already"):
            prepare(model, include)


class Mine(nn.Linear):
    pass


def test_types_and_their_names_mean_subclasses_too_which_are_listed():
    model = nn.Sequential(nn.Linear(16, 16), Mine(16, 16), nn.Conv1d(16, 16, 3))
    for include in ([nn.Linear], ["Linear"], ["[01]"]):
        selection = select_layers(model, include)
        assert list(selection.layers) == ["0"]
        assert [one.name for one in selection.skipped] == ["1"]
    assert names(model, None, [nn.Linear]) == ["2"]


def test_shares_are_of_all_weight_matrices():
    model = nn.ModuleDict({"body": nn.Linear(30, 10), "head": nn.Linear(10, 10), "table": nn.Embedding(50, 10)})
    (head,) = select_layers(model).skipped
    assert head.share == 100 / 400


def test_equal_reasons_are_one_line_of_the_log(caplog):
    layers = {f"conv{index}": nn.Conv2d(8, 8, 1, groups=2) for index in range(5)}
    with caplog.at_level(logging.WARNING, "gblr_plugin"):
        log_skipped(select_layers(nn.ModuleDict({**layers, "fc1": nn.Linear(16, 16)})).skipped)
    assert [record.getMessage() for record in caplog.records] == [
        "left dense: 5 layers, conv0 to conv4 (38.5% of the multiply-adds of one position): convolution with groups=2: "
        "only groups=1 can be structured"
    ]


def test_a_selection_of_a_tied_head_alone_says_so():
    model = nn.ModuleDict({"table": nn.Embedding(20, 16), "head": nn.Linear(16, 20, bias=False)})
    with pytest.raises(ConfigError, match="the selection is empty; layer 'head': it is an output head"):
        select_layers(model, ["he*"])
    model["head"].weight = model["table"].weight
    with pytest.raises(
        ConfigError, match="the selection is empty; layer 'head': its weight is tied to that of 'table'"
    ):
        select_layers(model)


def test_a_filter_passes_prepared_layers_too():
    model = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16), "head": nn.Linear(16, 16)})
    prepare(model, ["a"])
    passes = layer_filter(model)
    assert [name for name, module in model.named_modules() if passes(module, name)] == ["a", "b"]
