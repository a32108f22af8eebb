"""Soft labels, accuracy by source, mixtures of sets; from several annotators' labels to a trained reward model."""

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from tests.reward import runs
from tests.reward.test_data import pair, ranking, tokenize
from trl_ext.data import convert_rows, mix_datasets
from trl_ext.feedback.exchange import preference_rows
from trl_ext.feedback.labels import LabelFile, read_labels
from trl_ext.feedback.pairs import make_pair
from trl_ext.reward.losses import preference_loss, smoothing_of
from trl_ext.scripts.evaluate_reward import better_first


def test_a_soft_label_is_the_cross_entropy_with_it_and_its_minimum_is_the_share_of_votes():
    lead = torch.tensor([0.3], requires_grad=True)
    loss = preference_loss(lead, torch.zeros(1), label_smoothing=smoothing_of(0.75))
    expected = -0.75 * F.logsigmoid(lead) - 0.25 * F.logsigmoid(-lead)
    torch.testing.assert_close(loss, expected.squeeze())
    best = torch.tensor([0.75]).logit().requires_grad_()
    preference_loss(best, torch.zeros(1), label_smoothing=smoothing_of(0.75)).backward()
    assert best.grad.abs().item() < 1e-7
    assert smoothing_of(1.0) == 0
    assert smoothing_of(1.0, 0.1) == pytest.approx(0.1)
    assert smoothing_of(0.75, 0.1) == pytest.approx(1 - (0.75 * 0.9 + 0.25 * 0.1))


def test_soft_labels_are_read_from_their_column_and_added_to_the_smoothing():
    rows, _ = tokenize(pair(soft_label=0.8), pair(prompt="w1 w1", soft_label=1.0))
    assert rows["label_smoothing"] == pytest.approx([0.2, 0.0])
    rows, _ = tokenize(pair(votes=0.8), soft_label_column="votes", label_smoothing=0.1)
    assert rows["label_smoothing"] == pytest.approx([1 - (0.8 * 0.9 + 0.2 * 0.1)])


def test_below_one_half_the_rejected_response_is_the_better_one():
    rows, report = tokenize(pair(soft_label=0.2, margin=0.5), pair(prompt="w1 w1", soft_label=0.5, margin=0.5))
    straight, _ = tokenize(pair(), pair(prompt="w1 w1"))
    assert rows["chosen_ids"][0] == rows["ids"][0][0] == straight["rejected_ids"][0]
    assert rows["rejected_ids"][0] == straight["chosen_ids"][0]
    assert rows["ids"][1] == straight["ids"][1]
    assert rows["label_smoothing"] == pytest.approx([0.2, 0.5])
    assert rows["margin"] == [-0.5, 0.5], "the loss is the same as before the swap"
    assert rows["decided"] == [True, False]
    assert "1 rows: sides swapped" in str(report)
    assert "1 rows: soft label 0.5" in str(report)
    held_out, _ = tokenize(pair(soft_label=0.2), name="eval_dataset")
    assert held_out["chosen_ids"][0] == straight["rejected_ids"][0]
    scored, _ = tokenize(pair(soft_label=0.2), name="dataset")
    assert scored["chosen_ids"][0] == straight["chosen_ids"][0], "scores of rows stand where their responses do"


def test_evaluate_reward_has_the_better_response_first(capsys):
    rows = [pair(soft_label=q, strength=s) for q, s in ((0.9, 2.0), (0.2, -1.0), (0.5, 0.0))]
    found = better_first(Dataset.from_list(rows)).to_list()
    assert [row["chosen"] for row in found] == [rows[0]["chosen"], rows[0]["rejected"]]
    assert [row["strength"] for row in found] == [2.0, 1.0]
    assert "1 rows below 0.5 have their sides swapped, 1 rows of 0.5 are left out" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"every soft_label is 0\.5"):
        better_first(Dataset.from_list(rows[2:]))


def test_accuracies_are_of_the_better_side_and_leave_out_what_is_undecided(base, tmp_path):
    plain = runs.pairs(10, seed=1, source=["helpful"] * 6 + ["harmless"] * 4)
    turned = plain.rename_columns({"chosen": "rejected", "rejected": "chosen"}).add_column("soft_label", [0.1] * 10)
    trainer = runs.trainer(base, tmp_path, eval_dataset=turned)
    metrics = trainer.evaluate()
    scores = trainer.score(plain)
    right, lead = (scores["chosen"] > scores["rejected"]).float(), scores["chosen"] - scores["rejected"]
    assert metrics["eval_accuracy"] == pytest.approx(right.mean().item())
    assert metrics["eval_accuracy/helpful"] == pytest.approx(right[:6].mean().item())
    assert metrics["eval_margin"] == pytest.approx(lead.mean().item(), abs=1e-6)
    assert trainer.evaluate_pairs()["accuracy"] == pytest.approx(right.mean().item())
    assert trainer.measure_scale().mean == pytest.approx(scores["chosen"].mean().item(), abs=1e-6)
    keep = right.argsort()[:4].tolist()  # wrong ones first: their share is not that of all
    soft = [1.0 if i in keep else 0.5 for i in range(10)]
    undecided = plain.add_column("soft_label", soft)
    metrics = trainer.evaluate(undecided)
    assert metrics["eval_accuracy"] == pytest.approx(right[keep].mean().item())
    assert metrics["eval_accuracy"] != pytest.approx(right.mean().item())
    own = [i for i in range(6) if i in keep]
    assert metrics.get("eval_accuracy/helpful") == (pytest.approx(right[own].mean().item()) if own else None)
    assert trainer.evaluate_pairs(undecided)["count"] == 4


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (pair(), {"soft_label_column": "votes"}, "soft_label_column='votes' is no column of train_dataset"),
        (pair(soft_label=1.2), {}, "row 0 of train_dataset: soft_label is 1.2, it must be from 0 to 1"),
        (pair(soft_label=None), {}, "soft_label is None, it must be a finite number"),
        (ranking(soft_label=0.5), {}, "'soft_label' beside rankings"),
    ],
)
def test_soft_labels_that_are_none_are_refused(row, options, message):
    with pytest.raises(ValueError, match=message):
        tokenize(row, **options)


def test_accuracy_is_given_by_source(base, tmp_path):
    held_out = runs.pairs(10, seed=1, source=["helpful"] * 6 + ["harmless"] * 4)
    trainer = runs.trainer(base, tmp_path, eval_dataset=held_out)
    metrics = trainer.evaluate()
    scores = trainer.score(held_out)
    right = (scores["chosen"] > scores["rejected"]).float()
    assert metrics["eval_accuracy/helpful"] == pytest.approx(right[:6].mean().item())
    assert metrics["eval_accuracy/harmless"] == pytest.approx(right[6:].mean().item())
    found = trainer.evaluate_pairs()["by_source"]
    assert {name: own["count"] for name, own in found.items()} == {"helpful": 6, "harmless": 4}
    assert found["harmless"]["accuracy"] == pytest.approx(right[6:].mean().item())
    assert metrics["eval_accuracy/helpful"] != metrics["eval_accuracy/harmless"]


def test_a_mixture_has_the_shares_of_the_weights_and_no_row_twice():
    helpful, harmless = runs.pairs(30, seed=1), runs.pairs(30, seed=2, soft_label=[0.75] * 30)
    mixed = mix_datasets({"helpful": helpful, "harmless": harmless}, {"helpful": 2, "harmless": 1}, seed=3)
    assert mixed["source"].count("helpful") == 30
    assert mixed["source"].count("harmless") == 15
    assert len({(row["prompt"], row["chosen"]) for row in mixed}) == 45
    assert {row["soft_label"] for row in mixed if row["source"] == "harmless"} == {0.75}
    assert {row["soft_label"] for row in mixed if row["source"] == "helpful"} == {1.0}
    assert mixed["source"][:20] != sorted(mixed["source"][:20])
    again = mix_datasets({"helpful": helpful, "harmless": harmless}, {"helpful": 2, "harmless": 1}, seed=3)
    assert again.to_list() == mixed.to_list()
    with pytest.raises(ValueError, match="one for each"):
        mix_datasets({"helpful": helpful}, {"harmless": 1.0})
    with pytest.raises(ValueError, match="weight of helpful in the mixture is 0"):
        mix_datasets({"helpful": helpful}, {"helpful": 0})
    with pytest.raises(ValueError, match="convert both alike"):
        mix_datasets({"a": helpful, "b": runs.rankings()}, {"a": 1, "b": 1})


def test_from_the_labels_of_three_annotators_to_a_trained_reward_model(base, tmp_path):
    made = [make_pair({**row, "source": "page"}) for row in runs.pairs(6).to_list()]
    for name, verdicts in (("anna", "aaaabb"), ("ben", "aaabab"), ("cleo", "aabbbb")):
        file = LabelFile(tmp_path / "labels", name, [each.id for each in made])
        for each, verdict in zip(made, verdicts, strict=True):
            file.label(each.id, verdict)
    rows, dropped = preference_rows(made, read_labels(tmp_path / "labels"))
    assert not dropped
    dataset, report = convert_rows(rows)
    assert report.rows_kept == 6
    assert dataset["soft_label"] == pytest.approx([1, 1, 2 / 3, 2 / 3, 2 / 3, 1])
    assert set(dataset["source"]) == {"page"}
    trainer = runs.trainer(base, tmp_path / "run", dataset=dataset, normalize_rewards=False)
    assert trainer.train_dataset["label_smoothing"] == pytest.approx([0, 0, 1 / 3, 1 / 3, 1 / 3, 0])
    trainer.train()
    assert [name for name in trainer.state.log_history[0] if name.startswith("accuracy/")] == ["accuracy/page"]


def test_soft_labels_outside_0_to_1_are_dropped_and_counted_when_a_file_is_read():
    _, report = convert_rows(Dataset.from_list([pair(soft_label=0.5), pair(prompt="w1", soft_label=3.0)]))
    assert report.dropped == {"soft_label is no probability": 1}
