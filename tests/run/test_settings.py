import pytest

from gblr_plugin import ConfigError
from gblr_plugin.run.settings import Method, RunSettings, Training


def test_defaults_are_valid():
    settings = RunSettings("digits_vit", budget=0.25)
    assert [method.name for method in settings.methods] == ["gblr", "low_rank"]
    assert settings.seeds == [0, 1, 2]


@pytest.mark.parametrize("budget", [0, -0.1, 1.01, float("nan"), float("inf")])
def test_budget_range(budget):
    with pytest.raises(ConfigError, match=r"budget must be relative FLOPs in \(0, 1\]"):
        RunSettings("digits_vit", budget=budget)
    assert RunSettings("digits_vit", budget=1.0).budget == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": None}, "give either budget or config_list"),
        ({"config_list": [{}]}, "give either budget or config_list"),
        ({"seeds": []}, "seeds must not be empty"),
        ({"seeds": [1, 1]}, "seeds must be different"),
        ({"seeds": [-1]}, "seeds must be a whole number from 0 to 2147483647, got -1"),
        ({"methods": []}, "methods must not be empty"),
        ({"methods": [Method("gblr"), Method("gblr")]}, "each name may stand once"),
        ({"methods": [Method("dense")]}, "'dense' is always measured"),
        ({"latency_batch": [0]}, "latency_batch must be a whole number of at least 1, got 0"),
        ({"latency_batch": []}, "latency_batch must not be empty"),
        ({"threads": 0}, "threads must be a whole number from 1 to 1024, got 0"),
        ({"threads": 1_000_000}, "threads must be a whole number from 1 to 1024, got 1000000"),
        ({"weights": "dense.pt"}, "weights has seen the training data of one seed"),
    ],
)
def test_run_settings(arguments, message):
    with pytest.raises(ConfigError, match=message):
        RunSettings(**{"task": "digits_vit", "budget": 0.5, **arguments})


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Training, {"epochs": 0}, "epochs must be a whole number of at least 1"),
        (Training, {"batch_size": 0}, "batch_size must be a whole number of at least 1"),
        (Training, {"lr": 0.0}, "lr must be positive"),
        (Training, {"warmup_fraction": 1.0}, "warmup_fraction must be a number in"),
        (Training, {"distillation": 1.5}, "distillation must be a number in"),
        (Training, {"temperature": 0.0}, "temperature must be positive"),
        (Training, {"limit_train_batches": 0.0}, "limit_train_batches must be a number in"),
        (Method, {"name": "low_rank", "starts": ["svd"]}, "starts are chosen for gblr alone, not for 'low_rank'"),
        (Method, {"name": "gblr", "starts": ["svd", "monarch"]}, "starts must be one of dense, gblr, .*got 'monarch'"),
        (Method, {"name": "gblr", "trial": 0.0}, "trial must be a share"),
        (Method, {"name": "gblr", "cooldown": 1.0}, "cooldown must be a number in"),
        (Method, {"name": "gblr", "warmup": -0.1}, "warmup must be a number in"),
        (Method, {"name": "gblr", "warmup": 0.5, "cooldown": 0.5}, "leave no steps to learn in"),
    ],
)
def test_parts(kind, arguments, message):
    with pytest.raises(ConfigError, match=message):
        kind(**arguments)


@pytest.mark.parametrize(("epochs", "share", "steps"), [(30, 0.2, 60), (1, 0.2, 2), (4, 0.5, 20), (4, 1.0, 40)])
def test_a_shortened_training_takes_its_share_of_the_steps(epochs, share, steps):
    training = Training(epochs=epochs, lr=0.5)
    short = training.shortened(share)
    assert short.steps(10) == steps
    assert short.lr == 0.5
    assert training.steps(10) == 10 * epochs
    assert Training(epochs=epochs, limit_train_batches=0.5).shortened(share).steps(20) == steps
