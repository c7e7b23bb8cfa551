"""The callback for the Trainer of transformers: what it learns, what its checkpoints hold, and what it refuses."""

from pathlib import Path

import pytest
import torch

import gblr_plugin as gblr
from gblr_plugin import ConfigError, GBLRTensor, LayerSettings

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
GBLRTrainerCallback = pytest.importorskip("gblr_plugin.huggingface").GBLRTrainerCallback

STOPS = [(None, 2), (None, 8), (LayerSettings("svd"), 4), (LayerSettings("svd"), 11)]
SIZES = {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 32, "n_positions": 16}


class Tokens(torch.utils.data.Dataset):
    """Random tokens, the same for each run."""

    ids = torch.randint(32, (24, 8), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def network():
    torch.manual_seed(0)
    config = transformers.GPT2Config(**SIZES, bos_token_id=0, eos_token_id=0, resid_pdrop=0.1)
    return transformers.GPT2LMHeadModel(config)


def trainer_of(folder: Path, callback, steps=12, **options):
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to=[],
        logging_steps=4,
        disable_tqdm=True,
        weight_decay=0.1,
        learning_rate=1e-2,
        **{"save_strategy": "no", **options},
    )
    return transformers.Trainer(network(), arguments, train_dataset=Tokens(), callbacks=[callback])


def test_it_learns_logs_and_leaves_a_model_to_convert(tmp_path):
    callback = GBLRTrainerCallback(0.4)
    trainer = trainer_of(tmp_path, callback)
    trainer.train()
    assert callback.learner.frozen
    assert callback.learner.step_count == 12
    assert callback.learner.relative_flops <= 0.4
    logged = [entry["gblr/relative_flops"] for entry in trainer.state.log_history if "gblr/relative_flops" in entry]
    assert logged[-1] <= 0.4 < logged[0]
    optimizer = trainer.optimizer.optimizer
    own = [group for group in optimizer.param_groups if group.get("gblr_structure")]
    assert [group["weight_decay"] for group in own] == [0.0]
    model = gblr.convert(trainer.model).eval()
    model.save_pretrained(tmp_path / "folder")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    assert isinstance(again.transformer.h[0].mlp.c_fc.weight.data, GBLRTensor)
    assert torch.equal(again(Tokens.ids[:2]).logits, model(Tokens.ids[:2]).logits)


@pytest.mark.parametrize(("start", "stop"), STOPS, ids=["dense first, 2", "dense first, 8", "svd, 4", "svd, 11"])
def test_training_goes_on_to_the_bit(tmp_path, start, stop):
    def run(folder, steps=12, **options):
        callback = GBLRTrainerCallback(0.4, settings=start, warmup=1, cooldown=6, structure_lr=5e-3)
        return trainer_of(folder, callback, lr_scheduler_type="cosine", **options), callback

    whole, one = run(tmp_path / "whole")
    whole.train()
    first, _ = run(tmp_path / "half", save_strategy="steps", save_steps=stop)
    first.add_callback(StopAt(stop))
    first.train()
    second, other = run(tmp_path / "half", save_strategy="steps", save_steps=100)
    second.train(resume_from_checkpoint=str(tmp_path / "half" / f"checkpoint-{stop}"))
    assert other.learner.step_count == 12
    expected, found = whole.model.state_dict(), second.model.state_dict()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert start is None or other.learner.state_dict() == one.learner.state_dict()


class StopAt(transformers.TrainerCallback):
    """Ends training at a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_a_checkpoint_without_a_learner_is_refused(tmp_path):
    callback = GBLRTrainerCallback(0.4)
    first = trainer_of(tmp_path, callback, steps=2, save_strategy="steps", save_steps=2)
    first.train()
    path = tmp_path / "checkpoint-2" / "optimizer.pt"
    state = torch.load(path)
    assert "gblr_learner" in state["param_groups"][0]
    del state["param_groups"][0]["gblr_learner"]
    torch.save(state, path)
    second = trainer_of(tmp_path, GBLRTrainerCallback(0.4), save_strategy="steps", save_steps=2)
    with pytest.raises(ConfigError, match="the checkpoint holds no learner"):
        second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_training_that_ends_early_says_so(tmp_path, caplog):
    callback = GBLRTrainerCallback(0.4, warmup=2, cooldown=10)
    trainer_of(tmp_path, callback, steps=4).train()
    assert "training ended at step 4, before the cool-down" in caplog.text


def test_arguments(tmp_path):
    with pytest.raises(ConfigError, match="warmup"):
        GBLRTrainerCallback(0.4, warmup=1.5)
    with pytest.raises(ConfigError, match="structure_lr"):
        GBLRTrainerCallback(0.4, structure_lr=0)
    callback = GBLRTrainerCallback(threshold=1e-3, layers=["*.mlp.*"], exclude=["*.c_proj"], row_splits="auto")
    trainer = trainer_of(tmp_path, callback, steps=2)
    assert [n for n, m in trainer.model.named_modules() if isinstance(m, gblr.GBLRLayer)] == [
        "transformer.h.0.mlp.c_fc"
    ]
    trainer.train()
