"""Preference strength by hand, what is done about doubted labels, and members that are trained one after another."""

import contextlib
import os
import signal

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from tests.ppo import tiny
from tests.reward import runs
from trl_ext.reward.strength import apply_strength, is_trained, preference_strength, train_ensemble
from trl_ext.reward.trainer import RewardModelTrainer
from trl_ext.roles import RewardModel, RewardScale, load_base

# Two models and five pairs: strengths 2, -1, 0.5, -3, 0; the models disagree about the third and the last
DIFFERENCES = torch.tensor([[1.0, -1.0, 2.0, -2.0, 1.0], [3.0, -1.0, -1.0, -4.0, -1.0]])
MEAN, STD = [2.0, -1.0, 0.5, -3.0, 0.0], [1.0, 0.0, 1.5, 1.0, 1.0]


def dataset(rows=5):
    return Dataset.from_dict(
        {"prompt": ["p"] * rows, "chosen": [f"c{i}" for i in range(rows)], "rejected": [f"r{i}" for i in range(rows)]}
    )


def test_mean_and_biased_standard_deviation_by_hand():
    mean, std = preference_strength(DIFFERENCES)
    assert mean.tolist() == MEAN
    assert std.tolist() == STD


@pytest.mark.parametrize(
    ("differences", "match"),
    [
        (torch.zeros(1, 5), r"at least two reward models, got \(1, 5\)"),
        (torch.zeros(5), r"must be \(M, N\)"),
        (torch.tensor([[1.0, float("nan")], [1.0, 2.0]]), "not finite"),
        (torch.tensor([[1.0, float("inf")], [1.0, 2.0]]), "not finite"),
    ],
)
def test_differences_that_measure_nothing_are_refused(differences, match):
    with pytest.raises(ValueError, match=match):
        preference_strength(differences)


@pytest.mark.parametrize(
    ("options", "suspected", "threshold"),
    [
        ({}, [1, 3], 0.0),
        ({"threshold": 1.0}, [1, 2, 3, 4], 1.0),
        ({"threshold": -5.0}, [], -5.0),
        ({"share": 0.2}, [3], -1.0),
        ({"share": 0.6}, [1, 3, 4], 0.5),
        ({"share": 0.0}, [], -3.0),
    ],
)
def test_labels_are_doubted_below_a_threshold_or_by_share(options, suspected, threshold):
    found, report = apply_strength(dataset(), DIFFERENCES, "smooth", **options)
    assert [i for i, doubted in enumerate(found["suspected"]) if doubted] == suspected
    assert (report.suspected, report.threshold) == (len(suspected), threshold)


@pytest.mark.parametrize("action", ["smooth", "margin"])
def test_smooth_and_margin_only_write_columns(action):
    found, _ = apply_strength(dataset(), DIFFERENCES, action)
    assert found["strength_mean"][:] == MEAN
    assert found["strength_std"][:] == STD
    assert found.select_columns(["prompt", "chosen", "rejected"]).to_list() == dataset().to_list()


def test_flip_swaps_the_doubted_pairs_and_their_strength():
    found, _ = apply_strength(dataset(), DIFFERENCES, "flip")
    assert found["chosen"][:] == ["c0", "r1", "c2", "r3", "c4"]
    assert found["rejected"][:] == ["r0", "c1", "r2", "c3", "r4"]
    assert found["strength_mean"][:] == [2.0, 1.0, 0.5, 3.0, 0.0]
    assert found["suspected"][:] == [False, True, False, True, False]
    assert found["prompt"][:] == ["p"] * 5


def test_drop_leaves_the_doubted_pairs_out():
    found, report = apply_strength(dataset(), DIFFERENCES, "drop")
    assert found["chosen"][:] == ["c0", "c2", "c4"]
    assert found["strength_mean"][:] == [2.0, 0.5, 0.0]
    assert not any(found["suspected"])
    assert (report.pairs, report.suspected) == (5, 2)


def test_measured_again_the_columns_are_written_over():
    once, _ = apply_strength(dataset(), DIFFERENCES, "smooth")
    again, _ = apply_strength(once, -DIFFERENCES, "smooth")
    assert again["strength_mean"][:] == [-value for value in MEAN]
    assert again.column_names == once.column_names


def test_the_report_by_hand():
    _, report = apply_strength(dataset(), DIFFERENCES, "flip")
    # on one side: both, both, one of two, both, one of two
    assert report.agreement == pytest.approx((1 + 1 + 0.5 + 1 + 0.5) / 5)
    assert report.members_right == pytest.approx([3 / 5, 1 / 5])
    assert report.deciles == [-3.0, -1.0, 0.0, 0.5, 2.0]
    assert report.examples == [(3, -3.0, 1.0), (1, -1.0, 0.0), (4, 0.0, 1.0)]
    rows = dict(report.rows())
    assert rows["suspected labels"] == "2 (40.0%)"
    assert rows["done about them"] == "flip"
    assert rows["labels each model agrees with"] == "0.600, 0.200"


def test_deciles_are_tenths():
    differences = torch.arange(20.0).expand(2, 20)
    _, report = apply_strength(dataset(20), differences, "smooth")
    assert report.deciles == [0.5 + 2 * i for i in range(10)]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"action": "forget"}, "action='forget' is unknown: use one of flip, smooth, margin, drop"),
        ({"share": 1.0}, r"share=1.0 must lie between 0 and 1"),
        ({"share": -0.1}, "share=-0.1"),
        ({"dataset": Dataset.from_dict({"prompt": ["p"] * 5})}, "measured on chosen and rejected"),
        ({"dataset": dataset(4)}, "differences are of 5 pairs, the dataset has 4"),
    ],
)
def test_what_does_not_fit_is_an_error(options, match):
    given = {"dataset": dataset(), "differences": DIFFERENCES, "action": "flip", **options}
    with pytest.raises(ValueError, match=match):
        apply_strength(**given)


# ---------------------------------------------------------------------- members


def members(base, folder, seeds, trained, rows=12, **options):
    """(weights, scores) of each member; `trained` collects the folders of those that were trained."""
    model = RewardModel(load_base(str(base)), tiny.lora("SEQ_CLS"))

    def make(model, args):
        assert (args.seed, args.data_seed) == (seeds[len(found)],) * 2
        made = RewardModelTrainer(model, args, runs.pairs(rows))
        train = made.train
        made.train = lambda **options: trained.append(args.output_dir.rsplit("_", 1)[-1]) or train(**options)
        return made

    found = []
    for trainer in train_ensemble(model, runs.config(folder, **options), seeds, make):
        found.append((runs.weights(model), trainer.score(runs.pairs(4, seed=7))["chosen"]))
    return found


def test_members_differ_and_one_that_is_saved_is_not_trained_again(base, tmp_path):
    trained = []
    first = members(base, tmp_path, [1, 2], trained)
    assert trained == ["1", "2"]
    assert not tiny.same(first[0][0], first[1][0])
    assert (first[0][1] - first[1][1]).abs().max() > 1e-3
    again = members(base, tmp_path, [1, 2, 3], trained)
    assert trained == ["1", "2", "3"], "only the third was trained"
    for (weights, scores), (loaded, same_scores) in zip(first, again, strict=False):
        assert tiny.same(weights, loaded)
        assert torch.equal(scores, same_scores)

    with pytest.raises(ValueError, match="member_1 was trained with another content of train_dataset, rows of train"):
        members(base, tmp_path, [1, 2], trained, rows=13)
    with pytest.raises(ValueError, match="member_1 was trained with another learning_rate, max_steps"):
        members(base, tmp_path, [1, 2], trained, learning_rate=5e-3, max_steps=7)

    alone = members(base, tmp_path / "other", [2], trained)
    assert tiny.same(alone[0][0], first[1][0]), "a member depends on its seed, not on those before it"


def test_members_with_the_same_seed_are_refused(base, tmp_path):
    with pytest.raises(ValueError, match="same seed are the same"):
        members(base, tmp_path, [1, 1], [])


def test_a_member_that_was_stopped_goes_on_from_its_own_checkpoint_and_from_no_other(base, tmp_path, caplog):
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}

    def ensemble(folder, callbacks=(), **options):
        model, steps = RewardModel(load_base(str(base)), tiny.lora("SEQ_CLS")), []

        class Count(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                steps.append(state.global_step)

        def make(model, args):
            return RewardModelTrainer(model, args, runs.pairs(12), callbacks=[Count(), *callbacks])

        with contextlib.suppress(SystemExit):
            for _ in train_ensemble(model, runs.config(folder, **(saving | options)), [1], make):
                pass
        return runs.weights(model), steps

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                signal.raise_signal(signal.SIGTERM)

    whole, _ = ensemble(tmp_path / "whole")
    assert ensemble(tmp_path / "run", [Stop()])[1] == [1, 2]
    weights, steps = ensemble(tmp_path / "run")
    assert steps == [3, 4]
    assert tiny.same(whole, weights)
    ensemble(tmp_path / "other", [Stop()])
    assert ensemble(tmp_path / "other", learning_rate=5e-3)[1] == [1, 2, 3, 4]
    assert "the run begins anew" in caplog.text
    assert "learning_rate=0.01" in caplog.text


def test_a_member_that_was_cut_while_it_was_saved_is_trained_anew(base, tmp_path, monkeypatch):
    """Weights without their scale would be another reward: they are written last."""
    model = RewardModel(load_base(str(base)), tiny.lora("SEQ_CLS"))
    model.scale = RewardScale(0.0, 2.0, 8)
    model.save_pretrained(str(tmp_path / "whole"))
    assert is_trained(tmp_path / "whole")
    real = os.replace
    for number in range(3):
        done = []

        def replace(*names, number=number, done=done):
            if len(done) == number:
                raise KeyboardInterrupt
            done.append(names)
            real(*names)

        monkeypatch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            model.save_pretrained(str(tmp_path / str(number)))
        assert not is_trained(tmp_path / str(number))
