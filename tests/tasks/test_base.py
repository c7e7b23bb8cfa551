from itertools import pairwise

import pytest
import torch

from gblr_plugin import ConfigError
from gblr_plugin.tasks import get_task
from gblr_plugin.tasks.base import IGNORED, ClassifierModule, PairsDataModule
from gblr_plugin.tasks.digits import DigitsTask
from gblr_plugin.tasks.text import TextTask

SMALL = {
    "digits_vit": {"dim": 16, "depth": 1, "heads": 2},
    "byte_gpt": {"dim": 16, "depth": 1, "heads": 2, "context": 16, "train_bytes": 4000, "test_bytes": 1000},
}


@pytest.mark.parametrize("name", SMALL)
def test_a_built_in_task_fits_together(name):
    task = get_task(name)(**SMALL[name])
    network = task.network()
    data = task.data(seed=1, batch_size=8)
    x, target = next(iter(data.train_dataloader()))
    logits = network(x)
    assert logits.shape[:-1] == target.shape
    assert network(task.example_input(3)).shape[0] == 3
    module = task.module(network, _Training(), steps=10)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), target.flatten())
    assert torch.isfinite(loss)
    optimizer = module.configure_optimizers()["optimizer"]
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == sum(
        p.numel() for p in module.parameters()
    )


@pytest.mark.parametrize(("name", "stretch"), [("digits_vit", 1), ("byte_gpt", 64)])
def test_folds_divide_the_training_set_by_stretches(name, stretch):
    data = get_task(name)(**SMALL[name]).data(seed=1, batch_size=8)
    folds = [data.fold(index, 3) for index in range(3)]
    held = [fold.held_out.indices for fold in folds]
    assert sorted(index for part in held for index in part) == list(range(len(data.train_set)))
    for fold, part in zip(folds, held, strict=True):
        assert not set(part) & set(fold.train_set.indices)
        assert len(part) + len(fold.train_set.indices) == len(data.train_set)
        assert all(b == a + 1 for a, b in pairwise(part) if b % stretch)  # neighbours stay together
        assert (fold.batch_size, fold.seed, fold.stretch) == (data.batch_size, data.seed, stretch)
    if name == "digits_vit":
        assert {int(target) for _, target in folds[0].held_out} == set(range(10))


class _Training:
    epochs, lr, weight_decay, warmup_fraction, batch_size, label_smoothing = 1, 1e-3, 0.0, 0.1, 8, 0.0


def test_a_teacher_is_learned_from_and_does_not_become_a_part_of_the_module():
    class Taught(_Training):
        distillation, temperature = 0.25, 2.0

    module = ClassifierModule(torch.nn.Linear(4, 3), Taught(), "accuracy", 10)
    teacher = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Dropout(0.5))
    module.learn_from(teacher)
    module.log = lambda *_, **__: None
    x, target = torch.randn(5, 4), torch.tensor([0, 1, IGNORED, 2, 1])
    loss = module.training_step((x, target), 0)

    counted = target != IGNORED
    p, q = (torch.softmax(net(x)[counted] / 2, -1) for net in (teacher[0], module.network))
    distance = (p * (p / q).log()).sum(-1).mean()
    hard = torch.nn.functional.cross_entropy(module.network(x)[counted], target[counted])
    torch.testing.assert_close(loss, 0.75 * hard + 0.25 * 4 * distance)
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert set(module.state_dict()) == {"network.weight", "network.bias"}
    assert len(list(module.parameters())) == 2


def test_digits_are_split_by_the_seed_without_overlap():
    task = DigitsTask()

    def held_out(seed):
        images, target = next(iter(task.data(seed, 500).test_dataloader()))
        return images, target

    images, target = held_out(0)
    again, _ = held_out(0)
    other, _ = held_out(1)
    assert len(images) == 450
    assert torch.equal(images, again)
    assert not torch.equal(images, other)
    assert target.bincount().min() >= 43  # every class
    shown = {image.numpy().tobytes() for image in images}
    train = DigitsTask(shift=0).data(0, 64).train_set
    assert not shown & {train[i][0].numpy().tobytes() for i in range(len(train))}
    assert 0 <= float(images.min()) < float(images.max()) <= 1


def test_text_files_are_on_one_side_only(tmp_path):
    for i in range(20):
        (tmp_path / f"{i:02}.py").write_bytes(bytes([i]) * 100)
    task = TextTask(folder=str(tmp_path), context=8, dim=16, depth=1, heads=2)
    data = task.data(seed=0, batch_size=4)
    train, held_out = set(data.train_set.tokens.tolist()), set(data.held_out.tokens.tolist())
    assert not train & held_out
    assert len(train) == 18
    assert set(task.data(1, 4).held_out.tokens.tolist()) != held_out


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("digits_vit", {"depht": 2}, "depht"),
        ("digits_vit", {"dim": 15}, "heads 4 dim 15"),
        ("digits_vit", {"patch_size": 3}, "patch_size 3 must divide image_size 8"),
        ("digits_vit", {"patch_size": 0}, "patch_size must be a whole number of at least 1, got 0"),
        ("digits_vit", {"dim": "wide"}, "dim must be a whole number of at least 1, got 'wide'"),
        ("digits_vit", {"dropout": 1.0}, r"dropout must be a number in \[0, 1\)"),
        ("digits_vit", {"held_out": 1.5}, r"held_out must be a fraction in \(0, 1\)"),
        ("digits_vit", {"held_out": "half"}, "held_out must be a fraction"),
        ("digits_vit", {"shift": 9}, "shift must be 0 to 7 pixels"),
        ("byte_gpt", {"heads": 3}, "heads 3 must divide dim"),
        ("byte_gpt", {"context": 0}, "context must be a whole number of at least 1"),
        ("byte_gpt", {"folder": 3}, "folder must be a path"),
        ("byte_gpt", {"folder": "/nowhere"}, r"looked for \*.py files in /nowhere, found 0; need at least 10"),
    ],
)
def test_bad_arguments(name, arguments, message):
    with pytest.raises(ConfigError, match=message):  # noqa: PT012  # made, then used
        task = get_task(name)(**arguments)
        task.network()
        task.data(0, 8)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digits", "unknown task 'digits'; allowed are digits_vit, byte_gpt, vit, mixer, resnet, gpt2, bert or"),
        ("no_such_module:Task", "cannot import 'no_such_module'"),
        ("gblr_plugin.tasks.digits:Digit", "'gblr_plugin.tasks.digits' has no class 'Digit'"),
        (":Task", "cannot import ''"),
        ("os:system", "'os' has no class 'system'"),
        ("subprocess:Popen", "'subprocess:Popen' is no task, it has no method 'network'"),
    ],
)
def test_unknown_tasks(name, message):
    with pytest.raises(ConfigError, match=r"^task: ") as caught:
        get_task(name)
    assert message in str(caught.value)


def test_task_by_import_path():
    assert get_task("gblr_plugin.tasks.digits:DigitsTask") is DigitsTask


@pytest.mark.parametrize(
    ("held_out", "most", "expected"),
    [
        (True, None, [0, 1, 2, 3]),
        (True, 2, [0, 2]),
        (True, 9, [0, 1, 2, 3]),
        (False, None, [0, 2, 5, 7]),  # as many as there are held-out ones
        (False, 2, [0, 5]),
    ],
)
def test_samples_are_spread_evenly_and_in_order(held_out, most, expected):
    data = PairsDataModule(list(range(10)), list(range(4)), batch_size=2, seed=0)
    assert [number for batch in data.sample(held_out, most) for number in batch.tolist()] == expected
