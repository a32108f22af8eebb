"""The guards: what passes, and what the error says."""

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from tests.ppo import tiny
from tests.reward import runs as runs_of_rewards
from tests.rrhf import ranked
from trl_ext import runs
from trl_ext.runs import (
    RunGuard,
    check_finite,
    check_first_kl,
    check_synchronised,
    check_weights,
    checksum,
    last_checkpoint,
    release,
)


def terms(**values):
    return {name: torch.tensor(value) for name, value in values.items()}


def model(*broken):
    made = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    made[1].bias.requires_grad_(False)
    for name in broken:
        made.get_parameter(name).data[0] = math.nan
    return made


def checkpoint(folder, step, value=1.0):
    path = folder / f"checkpoint-{step}"
    (path / "critic").mkdir(parents=True)
    save_file({"w": torch.ones(2), "n": torch.tensor([1])}, path / "adapter_model.safetensors")
    save_file({"w": torch.tensor([1.0, value])}, path / "critic" / "adapter_model.safetensors")
    return path


def test_finite_terms_pass(tmp_path):
    check_finite("loss", terms(rank_loss=1.0, sft_loss=-3e38), 0, str(tmp_path), model())


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_named_with_its_step_and_the_last_checkpoint(tmp_path, value):
    bad = terms(rank_loss=1.0, sft_loss=value)
    message = rf"^non-finite loss at step 7: {{'sft_loss': {value}}}.*have not been changed by it.*no checkpoint yet"
    with pytest.raises(RuntimeError, match=message):
        check_finite("loss", bad, 7, str(tmp_path), model())
    checkpoint(tmp_path, 4)
    with pytest.raises(RuntimeError, match=r"non-finite gradient norm at step 8: .*checkpoint is .*checkpoint-4\."):
        check_finite("gradient norm", bad, 8, str(tmp_path), model())


def test_weights_that_are_broken_are_not_said_to_be_whole(tmp_path):
    broken = model("0.weight", "1.weight")
    message = r"2 trained weights \(0\.weight, \.\.\.\) are not finite either\."
    with pytest.raises(RuntimeError, match=message) as error:
        check_finite("loss", terms(loss=math.nan), 7, str(tmp_path), broken)
    assert "have not been changed" not in str(error.value)
    with pytest.raises(RuntimeError, match=r"after step 3 1 trained weights \(1\.weight\) are not finite: the last"):
        check_weights(model("1.weight"), 3, str(tmp_path))
    check_weights(model("1.bias"), 3, str(tmp_path))  # which is not trained
    check_weights(model(), 3, str(tmp_path))


def test_the_last_good_checkpoint_is_one_whose_weights_are_finite(tmp_path):
    assert last_checkpoint(str(tmp_path)) == "There is no checkpoint yet."
    checkpoint(tmp_path, 10, math.nan)
    assert "There is no good checkpoint: " in last_checkpoint(str(tmp_path))
    good = checkpoint(tmp_path, 9)
    sentence = last_checkpoint(str(tmp_path))
    assert sentence.startswith(f"The last good checkpoint is {good}. ")
    assert "The weights in checkpoint-10 are missing or broken." in sentence
    (tmp_path / "checkpoint-11").mkdir()  # nothing in it
    torn = checkpoint(tmp_path, 12) / "adapter_model.safetensors"
    torn.write_bytes(torn.read_bytes()[:20])
    sentence = last_checkpoint(str(tmp_path))
    assert sentence.startswith(f"The last good checkpoint is {good}. ")
    assert "checkpoint-12, checkpoint-11, checkpoint-10" in sentence


def test_the_first_kl_is_zero_or_an_error():
    logps = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    check_first_kl(logps, torch.tensor([[-1.0, -2.0]]))
    with pytest.raises(RuntimeError, match=r"differ from the reference's by up to 0\.5: "):
        check_first_kl(logps, torch.tensor([[-1.0, -1.5]]))


# ---------------------------------------------------------------------- several processes


class DistributedDataParallel(nn.Module):  # by its name
    def __init__(self, module):
        super().__init__()
        self.module = module


def processes(other=None):
    """An accelerator of two processes, the second of which has the trained weights of `other`, if it has others."""

    def gather(sums):
        trained = [p for p in (other or model()).parameters() if p.requires_grad]
        theirs = torch.stack([checksum(p.detach()) for p in trained]) if other is not None else sums[0]
        return torch.stack([sums[0], theirs])

    return SimpleNamespace(num_processes=2, device="cpu", gather=gather)


def test_a_bare_model_on_two_processes_is_an_error_and_on_one_is_fine():
    check_synchronised(model(), SimpleNamespace(num_processes=1))
    check_synchronised(DistributedDataParallel(model()), processes())
    with pytest.raises(RuntimeError, match=r"2 processes, but the model is a bare Sequential.*train alone"):
        check_synchronised(model(), processes())


def test_weights_that_differ_in_one_bit_are_found():
    torch.manual_seed(0)
    mine = model()
    torch.manual_seed(0)
    other = model()
    check_synchronised(DistributedDataParallel(mine), processes(other))
    weight = other[1].weight.data
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    with pytest.raises(RuntimeError, match=r"1 trained weights \(module\.1\.weight\) differ .*processes \[1\] and"):
        check_synchronised(DistributedDataParallel(mine), processes(other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_checksum_sees_values_and_places(dtype):
    x = torch.randn(3, 5).to(dtype)
    assert torch.equal(checksum(x), checksum(x.clone()))
    assert not torch.equal(checksum(x), checksum(x.flip(1)))
    assert torch.equal(checksum(x.T), checksum(x.T.contiguous()))
    assert checksum(torch.tensor(1.0, dtype=dtype)).shape == (2,)


# ---------------------------------------------------------------------- the callback


class Tracker(TrainerCallback):
    """What a run is logged to: it has a place only after `on_train_begin`."""

    def __init__(self):
        self.place, self.logged = None, []

    def on_train_begin(self, args, state, control, **kwargs):
        self.place = "the run's"

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged.append(self.place)


def guard(callbacks=(), wrapped=None):
    wrapped = wrapped or model()
    return RunGuard(SimpleNamespace(num_processes=1, free_memory=lambda: None), lambda: wrapped, callbacks)


def arguments(tmp_path, warmup=0):
    return SimpleNamespace(
        output_dir=tmp_path, report_to=["mine"], warmup_steps=warmup, get_warmup_steps=lambda steps: warmup
    )


def test_an_evaluation_before_training_finds_its_trackers_set_up(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "get_reporting_integration_callbacks", lambda names: [Tracker])
    tracker, args = Tracker(), arguments(tmp_path)
    made, state, control = guard([TrainerCallback(), tracker]), TrainerState(max_steps=9), TrainerControl()
    made.on_prediction_step(args, state, control)
    assert tracker.place == "the run's"
    tracker.place = "as training left it"
    made.on_prediction_step(args, state, control)
    made.on_train_begin(args, state, control)
    made.on_prediction_step(args, state, control)
    assert tracker.place == "as training left it"


def test_a_warm_up_as_long_as_the_run_is_an_error_where_only_training_knows_how_long_it_is(tmp_path):
    guard().on_train_begin(arguments(tmp_path, 8), TrainerState(max_steps=9), TrainerControl())
    with pytest.raises(ValueError, match="9 of 9 optimizer steps"):
        guard().on_train_begin(arguments(tmp_path, 9), TrainerState(max_steps=9), TrainerControl())


@pytest.mark.parametrize("moment", ["save", "evaluation", "end of an epoch", "end"])
def test_broken_weights_are_neither_saved_nor_evaluated_nor_handed_over(tmp_path, moment):
    broken, args, state = model("0.weight"), arguments(tmp_path), TrainerState(max_steps=9, global_step=3)
    made = guard(wrapped=broken)
    made.on_step_end(args, state, TrainerControl(), model=broken)  # nothing happens to them
    control = TrainerControl(should_save=moment != "evaluation", should_evaluate=moment == "evaluation")
    call = {"end": made.on_train_end, "end of an epoch": made.on_epoch_end}.get(moment, made.on_step_end)
    with pytest.raises(RuntimeError, match=r"after step 3 1 trained weights \(0\.weight\)"):
        call(args, state, control, model=broken)


@pytest.fixture
def fresh_accelerate():
    """No settings of another test's trainer, and none left for the next."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_model_prepared_for_evaluation_is_given_back_as_it_was():
    accelerator, made = Accelerator(cpu=True, mixed_precision="bf16"), model()
    before, x = made.forward.__func__, torch.ones(1, 2)
    accelerator.prepare_model(made, evaluation_mode=True)
    assert made._is_accelerate_prepared
    assert made.forward.__func__ is not before
    release(made, accelerator)
    assert not hasattr(made, "_is_accelerate_prepared")
    assert made.forward.__func__ is before
    assert "_original_forward" not in vars(made)
    assert accelerator._models == []
    release(made, accelerator)
    assert made(x).dtype == torch.float32


# ---------------------------------------------------------------------- in every trainer


def reward_model(world, folder, **options):
    return runs_of_rewards.trainer(
        world / "base", folder, dataset=runs_of_rewards.pairs(16), eval_dataset=runs_of_rewards.pairs(4), **options
    )


def rrhf(world, folder, **options):
    return ranked.trainer(world, folder, dataset=ranked.ranked(16), eval_dataset=ranked.ranked(4), **options)


def ppo(world, folder, **options):
    return tiny.trainer(world, folder, dataset=tiny.prompts(16), eval_dataset=tiny.prompts(4), **options)


EVERY = pytest.mark.parametrize("make", [ppo, rrhf, reward_model])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("world"))


def trained_weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@EVERY
def test_resuming_a_finished_run_takes_no_further_step(world, tmp_path, make):
    # Step 3 is in the middle of an epoch of 4
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    first = make(world, tmp_path, **options)
    first.train()
    again = make(world, tmp_path, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    assert tiny.same(trained_weights(first), trained_weights(again))


@EVERY
def test_an_evaluation_before_training_changes_nothing_but_random_numbers(world, tmp_path, make, monkeypatch):
    monkeypatch.setattr(runs, "get_reporting_integration_callbacks", lambda names: [Tracker])
    tracker = Tracker()
    trainer = make(world, tmp_path, bf16=True, max_steps=1, callbacks=[tracker])
    forward = trainer.model.forward.__func__
    trainer.evaluate()
    assert trainer.model.forward.__func__ is forward
    assert not hasattr(trainer.model, "_is_accelerate_prepared")
    trainer.train()
    assert trainer.state.global_step == 1
    assert set(tracker.logged) == {"the run's"}


@EVERY
def test_broken_weights_end_the_run_before_its_checkpoint(world, tmp_path, make):
    class Break(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            next(p for p in model.parameters() if p.requires_grad).data.view(-1)[0] = math.nan

    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    held = {"update_kl_target": 0.0} if make is ppo else {}  # else the step would be taken back
    trainer = make(world, tmp_path, **saving, **held, callbacks=[Break()])
    with pytest.raises(RuntimeError, match=r"after step 1 1 trained weights .* are not finite"):
        trainer.train()
    assert not (tmp_path / "checkpoint-1").exists()
