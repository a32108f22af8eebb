"""RewardModelTrainer from the outside: its loss against TRL's, what it logs, keeps, resumes and publishes."""

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
import yaml
from peft import AutoPeftModelForSequenceClassification, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM, TrainerCallback
from trl import RewardConfig, RewardTrainer

from tests import chat
from tests.ppo import tiny
from tests.reward import runs
from trl_ext import Role, SharedBaseModel
from trl_ext.reward.trainer import RewardModelTrainer
from trl_ext.roles import RewardModel, load_base

ROWS = [0, 3, 5, 6]
METRICS = {"accuracy", "margin", "min_reward", "mean_reward", "max_reward", "num_tokens", "loss/preference"}
FILES = {"adapter_config.json", "adapter_model.safetensors", "reward_scale.json", "README.md"}


def plain_scores(model, texts):
    """Of each text alone, by plain PEFT."""
    tokenizer = tiny.tiny_tokenizer()
    with torch.no_grad():
        return torch.stack([model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, 0] for text in texts])


def loaded(folder):
    return AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()


def texts(dataset, column):
    return [f"{prompt}{text}<eos>" for prompt, text in zip(dataset["prompt"], dataset[column], strict=True)]


def differences(folder, dataset):
    model = loaded(folder)
    return plain_scores(model, texts(dataset, "chosen")) - plain_scores(model, texts(dataset, "rejected"))


def log(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# ---------------------------------------------------------------------- the loss


@pytest.mark.parametrize(
    ("options", "columns"),
    [
        pytest.param({}, {}, id="plain"),
        pytest.param({"center_rewards_coefficient": 0.1}, {}, id="centring"),
        pytest.param({}, {"margin": [0.1 * i for i in range(8)]}, id="margin column"),
    ],
)
def test_without_our_options_loss_and_metrics_are_those_of_the_plain_trainer(base, tmp_path, options, columns):
    dataset = runs.pairs(**columns)
    ours = runs.trainer(base, tmp_path / "ours", dataset=dataset, **options)
    ours.model.save_pretrained(str(tmp_path / "adapter"))
    plain = RewardTrainer(
        AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=1, is_trainable=True),
        RewardConfig(str(tmp_path / "plain"), use_cpu=True, report_to="none", bf16=False, disable_tqdm=True, **options),
        train_dataset=dataset,
        processing_class=tiny.tiny_tokenizer(),
    )
    theirs = plain.compute_loss(plain.model, plain.data_collator([plain.train_dataset[i] for i in ROWS]))
    loss = ours.compute_loss(ours.model, runs.batch(ours, ROWS))
    torch.testing.assert_close(loss, theirs, rtol=0, atol=1e-5)
    for name in METRICS - {"num_tokens", "loss/preference"}:
        mine, other = (sum(t._metrics["train"][name]) / len(t._metrics["train"][name]) for t in (ours, plain))
        # TRL's mean is over the sequences as they are padded; so is ours, each sequence being there once
        assert mine == pytest.approx(other, abs=1e-5), name
    loss.backward()
    theirs.backward()
    gradients = {name: p.grad for name, p in plain.model.named_parameters() if p.grad is not None}
    own = {name: p.grad for name, p in ours.model.named_parameters() if p.grad is not None}
    assert own.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-4, atol=1e-5)


def test_every_term_by_hand(base, tmp_path):
    dataset = runs.pairs(strength_mean=[0.5 * i - 1 for i in range(8)], suspected=[i % 2 == 1 for i in range(8)])
    trainer = runs.trainer(
        base,
        tmp_path,
        dataset=dataset,
        margin=0.25,
        margin_column="strength_mean",
        label_smoothing=0.2,
        label_smoothing_on="suspected",
        lm_coef=0.5,
        center_rewards_coefficient=0.1,
    )
    trainer.model.save_pretrained(str(tmp_path / "adapter"))
    loss = trainer.compute_loss(trainer.model, runs.batch(trainer, ROWS))

    rows = dataset.select(ROWS)
    model = loaded(tmp_path / "adapter")
    chosen, rejected = (plain_scores(model, texts(rows, column)) for column in ("chosen", "rejected"))
    p = torch.sigmoid(chosen - rejected - 0.25 - torch.tensor(rows["strength_mean"][:]))
    eps = torch.tensor([0.2 if i % 2 else 0.0 for i in ROWS])
    preference = -((1 - eps) * p.log() + eps * (1 - p).log()).mean()
    centring = 0.1 * ((chosen + rejected) ** 2).mean()

    causal = AutoModelForCausalLM.from_pretrained(base)
    model.get_base_model().model.eval()  # the backbone with the adapter, under the head of the base
    tokenizer, logps = tiny.tiny_tokenizer(), []
    for prompt, text in zip(rows["prompt"], texts(rows, "chosen"), strict=True):
        ids, start = torch.tensor(tokenizer(text)["input_ids"]), len(tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            logits = causal.lm_head(model.get_base_model().model(ids[None]).last_hidden_state[0])
        logps.append(F.log_softmax(logits, -1)[start - 1 : -1].gather(1, ids[start:, None]))
    imitation = -0.5 * torch.cat(logps).mean()

    terms = {"preference": preference, "centering": centring, "imitation": imitation}
    for name, value in terms.items():
        assert trainer._metrics["train"][f"loss/{name}"] == [pytest.approx(value.item(), abs=1e-5)], name
    assert loss.item() == pytest.approx(sum(terms.values()).item(), abs=1e-5)


def test_a_ranking_counts_once_whatever_its_number_of_pairs(base, tmp_path):
    dataset = runs.rankings(rows=4, k=3)
    trainer = runs.trainer(base, tmp_path, dataset=dataset)
    trainer.model.save_pretrained(str(tmp_path / "adapter"))
    loss = trainer.compute_loss(trainer.model, runs.batch(trainer, [0, 1]))
    model, per_row, right = loaded(tmp_path / "adapter"), [], []
    for row in dataset.select([0, 1]):
        order = sorted(range(3), key=lambda k: -row["scores"][k])
        scores = plain_scores(model, [f"{row['prompt']}{row['responses'][k]}<eos>" for k in order])
        leads = torch.stack([scores[0] - scores[1], scores[0] - scores[2], scores[1] - scores[2]])
        per_row.append(-F.logsigmoid(leads).mean())
        right.append((leads > 0).float().mean().item())
    assert loss.item() == pytest.approx(torch.stack(per_row).mean().item(), abs=1e-5)
    assert trainer._metrics["train"]["accuracy"] == pytest.approx(right)


def test_a_ranking_of_two_is_a_pair(base, tmp_path):
    dataset = runs.pairs()
    as_rankings = dataset.map(
        lambda row: {"responses": [row["rejected"], row["chosen"]], "scores": [0.0, 2.0]},
        remove_columns=["chosen", "rejected"],
    )
    losses = []
    for rows in (dataset, as_rankings):
        trainer = runs.trainer(base, tmp_path, dataset=rows, lm_coef=0.3)
        losses.append(trainer.compute_loss(trainer.model, runs.batch(trainer, ROWS)).item())
    assert losses[0] == losses[1]


# ---------------------------------------------------------------------- a run


def test_a_run_learns_logs_and_changes_nothing_but_adapter_and_head(base, tmp_path):
    options = {"lm_coef": 0.1, "center_rewards_coefficient": 0.01, "max_steps": 12}
    trainer = runs.trainer(base, tmp_path, dataset=runs.pairs(16), eval_dataset=runs.pairs(6, seed=5), **options)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(before[name], p)}
    assert changed == set(runs.weights(trainer.model))
    assert log(trainer, "loss/preference")[-1] < 0.3 < log(trainer, "loss/preference")[0]
    assert log(trainer, "accuracy")[-1] == 1.0
    expected = METRICS | {"loss/imitation", "loss/centering", "loss", "grad_norm", "learning_rate"}
    for entry in trainer.state.log_history[:-1]:
        assert expected <= set(entry)
        assert all(math.isfinite(value) for value in entry.values())
        terms = sum(value for name, value in entry.items() if name.startswith("loss/"))
        assert entry["loss"] == pytest.approx(terms, abs=1e-5)
    metrics = trainer.evaluate()
    assert {f"eval_{name}" for name in METRICS | {"loss/imitation", "loss/centering"}} <= set(metrics)


def test_options_that_are_off_log_no_term(base, tmp_path):
    trainer = runs.trainer(base, tmp_path)
    trainer.train()
    assert {name for name in trainer.state.log_history[0] if name.startswith("loss/")} == {"loss/preference"}


def test_a_token_that_is_shared_is_counted_and_run_once(base, tmp_path):
    tokens = {}
    for share in (True, False):
        trainer = runs.trainer(base, tmp_path, share_prompts=share, max_steps=1)
        batch = runs.batch(trainer, ROWS)
        loss = trainer.compute_loss(trainer.model, batch)
        tokens[share] = (trainer._total_train_tokens, loss.item())
        rows = [trainer.train_dataset[i] for i in ROWS]
    prompts, whole = sum(row["prompt_length"] for row in rows), sum(len(ids) for row in rows for ids in row["ids"])
    assert tokens[False][0] == whole
    assert tokens[True][0] == whole - prompts
    assert tokens[True][1] == pytest.approx(tokens[False][1], abs=1e-6)


def test_evaluation_is_by_hand_over_all_rows(base, tmp_path, monkeypatch):
    """Ten rows in batches of four: the last batch is smaller, and every row counts once."""
    held_out = runs.pairs(10, seed=3)
    trainer = runs.trainer(base, tmp_path, eval_dataset=held_out)
    trainer.model.save_pretrained(str(tmp_path / "adapter"))
    lead = differences(tmp_path / "adapter", held_out)
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == pytest.approx((lead > 0).float().mean().item())
    assert 0 < metrics["eval_accuracy"] < 1
    assert metrics["eval_margin"] == pytest.approx(lead.mean().item(), abs=1e-5)
    assert metrics["eval_loss"] == pytest.approx(-F.logsigmoid(lead).mean().item(), abs=1e-5)
    again = trainer.evaluate(held_out)
    assert again["eval_accuracy"] == metrics["eval_accuracy"]
    assert metrics["eval_loss/preference"] == pytest.approx(metrics["eval_loss"], abs=1e-5)
    trainer.evaluate({"a": held_out, "b": held_out.select(range(5))})
    first, second = trainer.state.log_history[-2:]
    assert (first["eval_a_loss"], first["eval_accuracy"]) == (metrics["eval_loss"], metrics["eval_accuracy"])
    assert second["eval_b_loss"] == pytest.approx(-F.logsigmoid(lead[:5]).mean().item(), abs=1e-5)
    assert second["eval_accuracy"] == pytest.approx((lead[:5] > 0).float().mean().item())

    scores = trainer.score(held_out)
    torch.testing.assert_close(scores["chosen"] - scores["rejected"], lead, rtol=0, atol=1e-5)
    assert scores["rows"].tolist() == list(range(10))
    assert scores["chosen_lengths"].tolist() == [len(text.split()) + 1 for text in held_out["chosen"]]
    results = trainer.evaluate_pairs()
    assert results["accuracy"] == pytest.approx(metrics["eval_accuracy"])
    assert trainer.evaluate_pairs(held_out.select(range(5)))["count"] == 5
    monkeypatch.setattr(trainer, "score", None)  # not called again
    assert trainer.evaluate_pairs(scores=scores) == trainer.evaluation == results


def test_every_row_of_an_accumulated_step_counts_in_its_metrics(base, tmp_path):
    """Ten rows in three batches, one optimizer step: the last batch of two must not cut the others."""
    trainer = runs.trainer(
        base, tmp_path, dataset=runs.pairs(10), gradient_accumulation_steps=3, max_steps=1, normalize_rewards=False
    )
    trainer.model.save_pretrained(str(tmp_path / "adapter"))
    lead = differences(tmp_path / "adapter", runs.pairs(10))
    trainer.train()
    assert log(trainer, "accuracy") == [pytest.approx((lead > 0).float().mean().item())]
    assert log(trainer, "margin") == [pytest.approx(lead.mean().item(), abs=1e-5)]


def test_accumulated_batches_are_one_large_batch(base, tmp_path):
    found = []
    for size in (8, 2):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "max_steps": 3}
        trainer = runs.trainer(base, tmp_path, **options)
        trainer.train()
        found.append((runs.weights(trainer.model), log(trainer, "loss")))
    (large, losses), (accumulated, small_losses) = found
    assert small_losses == pytest.approx(losses, abs=1e-5)
    for name, weight in large.items():
        torch.testing.assert_close(accumulated[name], weight, rtol=0, atol=2e-4)


def test_gradient_checkpointing_changes_nothing(base, tmp_path):
    found = []
    for on in (False, True):
        trainer = runs.trainer(base, tmp_path, gradient_checkpointing=on, lm_coef=0.1)
        trainer.model.train()
        if on:
            trainer.model.gradient_checkpointing_enable()
            assert any(getattr(m, "gradient_checkpointing", False) for m in trainer.model.modules())
        trainer.compute_loss(trainer.model, runs.batch(trainer, ROWS)).backward()
        found.append({name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None})
        trainer.model.zero_grad()
        trainer.train()
        found.append(runs.weights(trainer.model))
    off, weights_off, on, weights_on = found
    assert off.keys() == on.keys() == weights_off.keys()
    assert all(torch.equal(off[name], on[name]) for name in off)
    assert all(torch.equal(weights_off[name], weights_on[name]) for name in weights_off)


class KilledError(Exception):
    pass


class RaiseAfterSave(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        raise KilledError


def test_resuming_equals_never_stopping(base, tmp_path):
    options = {"lm_coef": 0.1, "max_steps": 5, "save_strategy": "steps", "save_steps": 3, "dataset": runs.pairs(16)}
    whole = runs.trainer(base, tmp_path / "whole", **options)
    whole.train()
    with pytest.raises(KilledError):
        runs.trainer(base, tmp_path / "killed", callbacks=[RaiseAfterSave()], **options).train()
    assert not (tmp_path / "killed" / "checkpoint-3" / "reward_scale.json").exists(), "not measured yet"
    torch.manual_seed(12345)
    resumed = runs.trainer(base, tmp_path / "killed", **options)
    resumed.train(resume_from_checkpoint=True)
    left, right = (tiny.comparable(t.state.log_history[:-1]) for t in (whole, resumed))
    for entry in (*left, *right):
        entry.pop("num_tokens")  # TRL counts those of the process
    assert left == right
    assert tiny.same(runs.weights(whole.model), runs.weights(resumed.model))
    assert whole.model.scale == resumed.model.scale


def test_the_best_checkpoint_comes_back_and_the_scale_is_its(base, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "accuracy", "greater_is_better": False}
    trainer = runs.trainer(base, tmp_path, eval_dataset=runs.pairs(6, seed=5), **options)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    saved = RewardModel(load_base(str(base)), tiny.lora("SEQ_CLS"))
    saved.load(best)
    assert tiny.same(runs.weights(saved), runs.weights(trainer.model))
    chosen = plain_scores(loaded(best), texts(runs.pairs(6, seed=5), "chosen"))
    assert trainer.model.scale.mean == pytest.approx(chosen.mean().item(), abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"lm_coef": 0.1, "center_rewards_coefficient": 0.1}], ids=str)
def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights(base, tmp_path, options):
    trainer = runs.trainer(base, tmp_path, eval_dataset=runs.pairs(4, seed=3), **options)
    head = next(p for name, p in trainer.model.named_parameters() if "modules_to_save" in name and p.requires_grad)
    with torch.no_grad():
        head[0, 0] = math.nan
    before = runs.weights(trainer.model)
    assert math.isnan(trainer.evaluate()["eval_loss"])
    with pytest.raises(RuntimeError, match=r"non-finite loss at step 0: \{'preference': nan") as error:
        trainer.train()
    assert ("'centering': nan" in str(error.value)) == bool(options)
    assert "imitation" not in str(error.value)
    after = runs.weights(trainer.model)
    assert all(torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before)


# ---------------------------------------------------------------------- the stored scale, and what is published


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """A trained trainer that was evaluated and has saved its model."""
    folder = tmp_path_factory.mktemp("my-reward")
    held_out = runs.pairs(10, seed=3)
    trainer = runs.trainer(base, folder, eval_dataset=held_out, lm_coef=0.25, max_steps=3, write_report=True)
    trainer.train()
    trainer.evaluate_pairs()
    trainer.save_model()
    return trainer


def test_reference_responses_score_mean_zero_and_std_one_in_the_reward_role(finished, base):
    folder = Path(finished.args.output_dir)
    assert {path.name for path in folder.iterdir()} >= FILES
    model = SharedBaseModel.from_pretrained(str(base), reward_adapter=folder)
    ids = [tiny.tiny_tokenizer()(text)["input_ids"] for text in texts(runs.pairs(10, seed=3), "chosen")]
    scores = torch.cat([model.score(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long)) for row in ids])
    assert scores.mean().item() == pytest.approx(0, abs=1e-5)
    assert scores.std().item() == pytest.approx(1, abs=1e-5)
    assert finished.model.scale.count == 10
    plain = plain_scores(loaded(folder), texts(runs.pairs(10, seed=3), "chosen"))
    torch.testing.assert_close((plain - plain.mean()) / plain.std(), scores, rtol=0, atol=1e-4)


def test_the_evaluation_is_in_run_json_and_on_the_page(finished):
    folder = Path(finished.args.output_dir)
    assert ["pairs", "10"] in json.loads((folder / "run.json").read_text())["evaluation"]
    assert "On test pairs, after training." in (folder / "report.html").read_text()


def test_the_scale_is_measured_on_what_was_asked_for(base, tmp_path):
    reference, held_out = runs.pairs(7, seed=8), runs.pairs(6, seed=3)
    for options, expected in (
        ({"eval_dataset": held_out, "reference_dataset": reference}, reference),
        ({"eval_dataset": held_out}, held_out),
        ({}, runs.pairs()),
        ({"reference_dataset": reference, "normalization_samples": 4}, reference.select(range(4))),
    ):
        trainer = runs.trainer(base, tmp_path, **options)
        trainer.model.save_pretrained(str(tmp_path / "adapter"))
        scale = trainer.measure_scale()
        chosen = plain_scores(loaded(tmp_path / "adapter"), texts(expected, "chosen"))
        assert (scale.mean, scale.std) == (
            pytest.approx(chosen.mean().item(), abs=1e-5),
            pytest.approx(chosen.std().item(), abs=1e-5),
        )
        assert scale.count == len(expected)


def test_without_normalisation_no_scale_is_stored(base, tmp_path):
    trainer = runs.trainer(base, tmp_path, normalize_rewards=False)
    trainer.train()
    trainer.save_model()
    assert trainer.model.scale is None
    assert not (tmp_path / "reward_scale.json").exists()
    assert "Not measured: scores are raw." in (tmp_path / "README.md").read_text()


def check_card(text, base):
    header = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])
    assert header["library_name"] == "peft"
    assert header["pipeline_tag"] == "text-classification"
    assert {"reward-model", "trl_ext"} <= set(header["tags"])
    assert f"`{Path(base).name}`" in text
    assert str(Path(base).parent) not in text  # no folder of this machine
    assert "AutoPeftModelForSequenceClassification" in text
    assert "| `lm_coef` | 0.25 |" in text


def test_the_card_has_evaluation_scale_options_and_course(finished, base):
    text = (Path(finished.args.output_dir) / "README.md").read_text()
    check_card(text, base)
    accuracy = finished.evaluation["accuracy"]
    assert f"| accuracy | {accuracy:.3f} ± " in text
    assert "| pairs | 10 |" in text
    assert f"On 10 reference responses the raw score has mean {finished.model.scale.mean:.4g}" in text
    header, _, *rows = re.findall(r"^\|.*\|$", text.split("## The run")[1], re.MULTILINE)
    assert header.startswith("| step | loss | accuracy |")
    assert [row.split("|")[1].strip() for row in rows] == ["1", "2", "3"]


def test_push_to_hub_uploads_the_adapter_and_our_card(base, tmp_path, monkeypatch):
    uploads = []

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns=(), **kwargs):
        uploads.append((repo_id, tmp_path / f"upload-{len(uploads)}"))
        shutil.copytree(folder_path, uploads[-1][1], ignore=shutil.ignore_patterns(*(ignore_patterns or ())))
        return "https://hub/commit"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, repo_id, **_: SimpleNamespace(
        repo_id=repo_id, url=f"https://hub/{repo_id}"))  # fmt: skip
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    options = {"push_to_hub": True, "hub_model_id": "me/my-reward", "hub_strategy": "end", "lm_coef": 0.25}
    trainer = runs.trainer(base, tmp_path / "out", **options)
    trainer.train()
    trainer.push_to_hub()
    repo, folder = uploads[-1]
    assert repo == "me/my-reward"
    text = (folder / "README.md").read_text()
    check_card(text, base)
    assert "# my-reward" in text
    assert {path.name for path in folder.iterdir()} >= FILES
    scores = plain_scores(loaded(folder), texts(runs.pairs(), "chosen"))
    torch.testing.assert_close(scores, trainer.score(runs.pairs())["chosen"], rtol=0, atol=1e-5)


# ---------------------------------------------------------------------- models and bad input


def test_a_base_in_four_bits(tmp_path):
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32}  # 4-bit kernels want multiples of 32
    LlamaForCausalLM(tiny.tiny_config(**sizes)).save_pretrained(tmp_path / "base")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    options = {"quantization_config": quantization, "gradient_checkpointing": True, "lm_coef": 0.1}
    trainer = runs.trainer(tmp_path / "base", tmp_path / "out", **options)
    assert trainer.model.is_loaded_in_4bit
    before = runs.weights(trainer.model)
    assert {weight.dtype for weight in before.values()} == {torch.float32}
    trainer.train()
    after = runs.weights(trainer.model)
    assert not any(torch.equal(before[name], after[name]) for name in before)
    trainer.save_model()
    shared = SharedBaseModel.from_pretrained(
        str(tmp_path / "base"), reward_adapter=tmp_path / "out", quantization_config=quantization, with_critic=False
    )
    row = trainer.train_dataset[0]
    raw = trainer.score(trainer.train_dataset)["chosen"][0]
    ids = torch.tensor([row["chosen_ids"]])
    normalised = (raw - trainer.model.scale.mean) / trainer.model.scale.std
    assert shared.score(ids, torch.ones_like(ids)).item() == pytest.approx(normalised.item(), abs=1e-3)


def test_a_model_an_id_and_a_reward_model_start_from_the_same(base, tmp_path):
    from_id = RewardModelTrainer(str(base), runs.config(tmp_path), runs.pairs(), peft_config=tiny.lora("SEQ_CLS"))
    start = runs.weights(from_id.model)
    from_model = RewardModelTrainer(
        load_base(str(base)), runs.config(tmp_path), runs.pairs(), peft_config=tiny.lora("SEQ_CLS")
    )
    assert tiny.same(start, runs.weights(from_model.model))
    from_id.train()
    trained = runs.weights(from_id.model)
    goes_on = RewardModelTrainer(from_id.model, runs.config(tmp_path), runs.pairs())
    assert tiny.same(trained, runs.weights(goes_on.model))
    goes_on.train()
    assert not tiny.same(trained, runs.weights(goes_on.model))


def test_an_overlapping_evaluation_set_is_warned_about_with_the_count(base, tmp_path):
    train, other = runs.pairs(8), runs.pairs(4, seed=9)
    overlapping = runs.Dataset.from_list([train[2], *other, train[5]])
    with pytest.warns(UserWarning, match="2 of 6 rows of eval_dataset"):
        runs.trainer(base, tmp_path, dataset=train, eval_dataset=overlapping)
    with pytest.warns(UserWarning, match="2 of 6 rows of eval_dataset seen"):
        runs.trainer(base, tmp_path, dataset=train, eval_dataset={"new": other, "seen": overlapping})


def test_dropped_rows_are_counted_in_the_reports(base, tmp_path, caplog):
    rows = runs.Dataset.from_list([*runs.pairs(4), {"prompt": "w0", "chosen": " w1" * 9, "rejected": " w2"}])
    trainer = runs.trainer(base, tmp_path, dataset=rows, eval_dataset=runs.pairs(3, seed=4), max_length=10)
    assert trainer.reports["train_dataset"].dropped == {"longer than max_length=10 tokens": 1}
    assert trainer.reports["eval_dataset"].rows_kept == 3
    assert "train_dataset: preference: 5 rows read, 4 kept" in caplog.text


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"train_dataset": None}, ValueError, "train_dataset is missing"),
        ({"train_dataset": runs.pairs().select_columns(["prompt"])}, ValueError, "needs `chosen` and `rejected`"),
        ({"train_dataset": runs.pairs(1)}, ValueError, "there is one reference response"),
        ({"model": "model", "quantization_config": BitsAndBytesConfig()}, ValueError, "loaded already"),
        ({"model": "reward", "peft_config": tiny.lora("SEQ_CLS")}, ValueError, "has an adapter already"),
        ({"model": "peft"}, TypeError, "has an adapter already"),
    ],
)
def test_what_cannot_be_trained_is_an_error(base, tmp_path, options, error, match):
    kinds = {"model": lambda m: m, "reward": RewardModel, "peft": lambda m: get_peft_model(m, tiny.lora())}
    options = {"model": str(base), "train_dataset": runs.pairs(), **options}
    if options["model"] in kinds:
        options["model"] = kinds[options["model"]](load_base(str(base)))
    with pytest.raises(error, match=match):
        RewardModelTrainer(args=runs.config(tmp_path), **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"label_smoothing": 0.5}, r"must be .* below 0\.5; at 0\.5 the labels say nothing"),
        ({"label_smoothing": -0.1}, "at least 0"),
        ({"label_smoothing_on": "some"}, "label_smoothing_on='some' must be one of all, suspected"),
        ({"lm_coef": float("nan")}, "lm_coef=nan must be a number"),
        ({"margin": "1"}, "margin='1' must be a number"),
        ({"normalization_samples": 1}, "must be a whole number of at least 2; normalize_rewards=False"),
        ({"remove_unused_columns": True}, "leave it False"),
        ({"pad_to_multiple_of": 8}, "no effect on packed rows"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        runs.config(tmp_path, **options)


def test_the_tokenizer_is_set_up_before_rows_are_tokenised(base, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] + ' <end> ' }}{% endfor %}")
    chat = [{"role": "user", "content": "w0"}]
    said = {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "w1"), ("rejected", "w2"))}
    rows = runs.Dataset.from_list([{"prompt": chat, **said}] * 2)
    trainer = runs.trainer(base, tmp_path, dataset=rows, chat_template_path=str(template))
    assert trainer.processing_class.decode(trainer.train_dataset[0]["chosen_ids"]) == "w0 <end> w1 <end>"
    trainer = runs.trainer(base, tmp_path, eos_token="<pad>")
    assert trainer.train_dataset[0]["chosen_ids"][-1] == trainer.processing_class.pad_token_id
    for options, match in (({"eos_token": "<no>"}, "not in the vocabulary"), ({"chat_template_path": "me/x"}, "file")):
        with pytest.raises(ValueError, match=match):
            runs.trainer(base, tmp_path, **options)


def test_the_critic_of_ppo_starts_from_what_was_trained(finished, base):
    model = SharedBaseModel.from_pretrained(str(base), reward_adapter=finished.args.output_dir)
    reward, critic = (model.adapter_weights(role) for role in (Role.REWARD, Role.CRITIC))
    assert all(torch.equal(reward.weights[name], critic.weights[name]) for name in reward.weights)
    torch.testing.assert_close(critic.head, reward.head / finished.model.scale.std)


@pytest.mark.parametrize("pad", ["<pad>", "<|im_end|>"], ids=["own pad", "pad is eos"])
def test_a_score_is_trained_where_trl_trains_it(tmp_path, pad):
    """A template with text behind the end token, and a tokenizer whose padding is its end token."""
    tokenizer = chat.tokenizer_of(chat.CHATML, "<|im_end|>", pad_token=pad)
    config = tiny.tiny_config(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 128
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    user = [{"role": "user", "content": "Hi"}]
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in ("Yes", "No, never."))
    plain = {"prompt": "Hi", "chosen": " Yes", "rejected": " No, never."}
    for rows in ([{"prompt": user, "chosen": chosen, "rejected": rejected}] * 2, [plain] * 2):
        dataset = runs.Dataset.from_list(rows)
        ours = runs.trainer(tmp_path / "base", tmp_path / "ours", dataset=dataset)
        ours.save_model()
        classifier = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "ours", num_labels=1)
        classifier.config.pad_token_id = tokenizer.pad_token_id
        theirs = RewardTrainer(
            classifier,
            args=RewardConfig(str(tmp_path / "theirs"), use_cpu=True, bf16=False, report_to="none"),
            train_dataset=dataset,
            processing_class=tokenizer,
        )
        collated = theirs.data_collator([theirs.train_dataset[0]])
        with torch.no_grad():
            inputs = {name: collated[name] for name in ("input_ids", "attention_mask")}
            expected = classifier.eval()(**inputs).logits[:, 0].tolist()
        scores = ours.score(dataset)
        assert [scores["chosen"][0].item(), scores["rejected"][0].item()] == pytest.approx(expected, abs=1e-5)


def test_options_of_the_chat_template_are_the_training_rows(tmp_path):
    template = chat.CHATML + "{% if quiet %} quiet{% endif %}"
    tokenizer = chat.tokenizer_of(template, "<|im_end|>", pad_token="<pad>")
    config = tiny.tiny_config(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 128
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    answers = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    dataset = runs.Dataset.from_list([{"prompt": [{"role": "user", "content": "Hi"}], **answers}] * 2)
    for options, ends in ((None, False), ({"quiet": True}, True)):
        args = runs.config(tmp_path / "out", chat_template_kwargs=options)
        trainer = RewardModelTrainer(str(tmp_path / "base"), args, dataset, processing_class=tokenizer)
        assert tokenizer.decode(trainer.train_dataset[0]["ids"][0]).endswith(" quiet") == ends


def test_a_model_that_is_trained_on_loses_its_old_scale(finished, base, tmp_path):
    model = RewardModel(load_base(str(base)), tiny.lora("SEQ_CLS"))
    model.load(finished.args.output_dir)
    assert model.scale is not None
    trainer = RewardModelTrainer(model, runs.config(tmp_path, normalize_rewards=False), runs.pairs())
    trainer.train()
    trainer.save_model()
    assert not (tmp_path / "reward_scale.json").exists()


def test_tokens_are_counted_on_after_a_resume(base, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = runs.trainer(base, tmp_path / "whole", **options)
    whole.train()
    resumed = runs.trainer(base, tmp_path / "whole", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    counts = [[e["num_tokens"] for e in t.state.log_history if "num_tokens" in e] for t in (whole, resumed)]
    assert counts[0] == counts[1]
    assert len(set(counts[0])) == 4


def test_rows_longer_than_the_models_positions_are_left_out_and_counted(base, tmp_path):
    rows = runs.Dataset.from_list([*runs.pairs(4), {"prompt": "w0", "chosen": " w1" * 70, "rejected": " w2"}])
    trainer = runs.trainer(base, tmp_path, dataset=rows)
    assert trainer.reports["train_dataset"].dropped == {"longer than the model's 64 positions": 1}


def test_dropout_that_is_no_module_is_switched_off(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base, attention_dropout=0.5)
    trainer = RewardModelTrainer(model, runs.config(tmp_path), runs.pairs(), peft_config=tiny.lora("SEQ_CLS"))
    runs.randomize(trainer.model)
    parts = runs.batch(trainer, ROWS)["parts"]
    trainer.model.train()
    first, second = (trainer.model(parts=parts)["scores"] for _ in range(2))
    assert torch.equal(first, second)


def test_the_first_of_several_evaluation_sets_is_evaluated(base, tmp_path):
    trainer = runs.trainer(base, tmp_path, eval_dataset={"a": runs.pairs(4, seed=3), "b": runs.pairs(5, seed=4)})
    assert trainer.evaluate_pairs()["count"] == 4


def test_columns_that_render_each_row_in_its_own_way_are_refused(base, tmp_path):
    with pytest.raises(ValueError, match=r"train_dataset has the columns \['tools'\]"):
        runs.trainer(base, tmp_path, dataset=runs.pairs(4, tools=["[]"] * 4))
