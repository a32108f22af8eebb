"""RRHFTrainer, offline: its loss by hand, what it trains, where it can be stopped, and what it takes."""

import re
from pathlib import Path

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
import yaml
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    BloomConfig,
    BloomForCausalLM,
    LlamaForCausalLM,
    TrainerCallback,
)

from tests.ppo import tiny
from tests.rrhf.ranked import chats, config, count_w3, ranked, ranked_rows, trainer, tuned
from trl_ext import Role, SharedBaseModel
from trl_ext.rrhf import RRHFTrainer
from trl_ext.rrhf.data import collate

CLOSE = {"rtol": 0, "atol": 1e-4}


def batch(run):
    """All training rows as one batch."""
    return collate(list(run.train_dataset))


def gradients(run, inputs) -> dict[str, torch.Tensor]:
    run.model.zero_grad()
    run.compute_loss(run.model, inputs).backward()
    return {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}


def plain_logps(model, tokenizer, prompt, response):
    """Log-probabilities of a response's tokens, by the model's own logits."""
    prompt_ids = tokenizer(prompt)["input_ids"]
    ids = tokenizer(response)["input_ids"] + [tokenizer.eos_token_id]
    logits = model(input_ids=torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1]
    return F.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None])[:, 0]


def by_hand(run, rows, length_penalty=1.0, margin=0.0, token_mean=False):
    """(rank loss, imitation loss, kl loss) of the paper, one response at a time."""
    terms = []
    for row in rows:
        logps = {}
        for role in (Role.POLICY, Role.REFERENCE):
            with torch.no_grad(), run.model.role(role):
                logps[role] = [
                    plain_logps(run.model, run.processing_class, row["prompt"], text) for text in row["responses"]
                ]
        own, r = logps[Role.POLICY], row["scores"]
        p = [x.sum() / len(x) ** length_penalty for x in own]
        pairs = [(i, j) for i in range(len(r)) for j in range(len(r)) if r[i] < r[j]]
        best = -own[r.index(max(r))]
        difference = torch.cat(logps[Role.REFERENCE]) - torch.cat(own)
        terms.append(
            torch.stack(
                [
                    sum((torch.relu(p[i] - p[j] + margin) for i, j in pairs), start=torch.tensor(0.0)),
                    best.mean() if token_mean else best.sum(),
                    (difference.exp() - difference - 1).mean(),
                ]
            )
        )
    return torch.stack(terms).mean(0)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"length_penalty": 0.5, "margin": 0.3, "sft_token_mean": True, "rank_coef": 2.0, "sft_coef": 0.5},
        {"beta": 0.7},
    ],
    ids=["paper", "options", "kl"],
)
def test_the_loss_is_the_papers(world, tmp_path, options, share):
    run = trainer(world, tmp_path, share_prompts=share, **options)
    with torch.no_grad():  # away from the reference
        for name, parameter in run.model.named_parameters():
            if "lora_B.default" in name:
                parameter.mul_(1.5)
    run.state.global_step = 1
    settings = {name: options[name] for name in ("length_penalty", "margin") if name in options}
    rank, sft, kl = by_hand(run, ranked_rows(), token_mean=options.get("sft_token_mean", False), **settings)
    args = run.args
    expected = args.rank_coef * rank + args.sft_coef * sft + args.beta * kl
    torch.testing.assert_close(run.compute_loss(run.model, batch(run)).detach(), expected, **CLOSE)
    assert min(rank, sft) > 0.1
    if "beta" in options:
        assert kl > 0.01


def test_gradients_with_and_without_sharing_and_checkpointing_are_equal(world, tmp_path):
    expected = None
    for share in (True, False):
        for checkpointing in (False, True):
            run = trainer(world, tmp_path, share_prompts=share, beta=0.3)
            run.state.global_step = 1
            if checkpointing:
                run.model.gradient_checkpointing_enable()
            run.model.train()
            found = gradients(run, batch(run))
            expected = expected or found
            assert found.keys() == expected.keys()
            for name, grad in found.items():
                torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5)
    assert all(".default." in name for name in expected)
    assert max(grad.abs().max() for grad in expected.values()) > 0.1


def test_a_batch_of_prompts_is_the_mean_of_one_at_a_time(world, tmp_path):
    run = trainer(world, tmp_path, beta=0.3)
    rows = batch(run)["rows"]
    together = gradients(run, {"rows": rows})
    alone = [gradients(run, {"rows": [row]}) for row in rows]
    for name, grad in together.items():
        torch.testing.assert_close(grad, sum(g[name] for g in alone) / len(rows), rtol=1e-4, atol=1e-5)


def test_accumulated_micro_batches_step_like_one_batch(world, tmp_path):
    whole = trainer(world, tmp_path / "a", per_device_train_batch_size=8)
    parts = trainer(world, tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=4)
    for run in (whole, parts):
        run.train()
    for (name, a), b in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: name + text)
    metrics = [run.state.log_history[-2] for run in (whole, parts)]
    for name in ("rank_loss", "sft_loss", "ranking_accuracy", "kendall_tau", "perplexity_best", "loss"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-3)


def test_only_the_policy_is_trained(world, tmp_path):
    model = SharedBaseModel.from_pretrained(
        str(world / "base"), policy_adapter=world / "policy", reward_adapter=world / "reward"
    )
    assert model.has_role(Role.CRITIC)
    run = trainer(world, tmp_path, model=model, beta=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    (group,) = run.optimizer.param_groups
    assert group["role"] == "policy"
    run.train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all(".default." in name for name in changed)
    named = {id(p) for name, p in model.named_parameters() if "lora_" in name and ".default." in name}
    assert {id(p) for p in group["params"]} == named


def test_it_learns_the_order_and_the_best_response(world, tmp_path):
    run = trainer(world, tmp_path, max_steps=40, per_device_train_batch_size=8, sft_token_mean=True)
    before, _, after = run.evaluate(run.train_dataset), run.train(), run.evaluate(run.train_dataset)
    assert after["eval_ranking_accuracy"] > max(0.95, before["eval_ranking_accuracy"] + 0.2)
    assert after["eval_kendall_tau"] > before["eval_kendall_tau"] + 0.4
    assert after["eval_perplexity_best"] < 0.5 * before["eval_perplexity_best"]
    assert after["eval_rank_loss"] < 0.1 * before["eval_rank_loss"]


def test_without_ranking_only_the_best_response_is_learnt(world, tmp_path):
    run = trainer(world, tmp_path, rank_coef=0.0)
    _, sft, _ = by_hand(run, ranked_rows())
    torch.testing.assert_close(run.compute_loss(run.model, batch(run)).detach(), sft, **CLOSE)


def test_rows_without_a_pair_are_counted_and_contribute_imitation_only(world, tmp_path):
    rows = [row | {"scores": [1.0] * len(row["scores"])} for row in ranked_rows(4)]
    run = trainer(world, tmp_path, dataset=Dataset.from_list(rows))
    assert run.data_counts["train_dataset"].counts["rows_without_a_pair"] == 4
    _, sft, _ = by_hand(run, rows)
    torch.testing.assert_close(run.compute_loss(run.model, batch(run)).detach(), sft, **CLOSE)


def test_beta_keeps_the_policy_near_the_reference(world, tmp_path):
    ends = {}
    for beta in (1e-9, 50.0):
        run = trainer(world, tmp_path, beta=beta, max_steps=15, learning_rate=3e-3)
        run.train()
        ends[beta] = run.evaluate(run.train_dataset)["eval_kl_loss"]
    assert 0 < ends[50.0] < 0.3 * ends[1e-9]
    assert run.state.log_history[0]["kl"] == 0  # the policy starts as the reference


def test_a_policy_that_is_not_the_reference_at_the_start_is_found(world, tmp_path):
    run = trainer(world, tmp_path, beta=0.1)
    with torch.no_grad():
        next(p for name, p in run.model.named_parameters() if "lora_B.default" in name).add_(1.0)
    with pytest.raises(RuntimeError, match="before the first update"):
        run.train()


def test_a_loss_that_is_not_finite_stops_the_run(world, tmp_path):
    run = trainer(world, tmp_path)
    with torch.no_grad():
        next(p for name, p in run.model.named_parameters() if "lora_B.default" in name).fill_(torch.nan)
    with pytest.raises(RuntimeError, match="non-finite loss at step 0"):
        run.train()


class KilledError(Exception):
    pass


class RaiseAfterSave(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        raise KilledError


@pytest.mark.parametrize("save_steps", [2, 4])
def test_a_resumed_run_ends_like_one_that_was_never_stopped(world, tmp_path, save_steps):
    options = {"max_steps": 5, "beta": 0.1, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 1}
    options |= {"save_strategy": "steps", "save_steps": save_steps, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"eval_dataset": ranked(5), "learning_rate": 3e-3}
    whole = trainer(world, tmp_path / "whole", **options)
    whole.train()
    with pytest.raises(KilledError):
        trainer(world, tmp_path / "killed", callbacks=[RaiseAfterSave()], **options).train()
    torch.manual_seed(12345)
    resumed = trainer(world, tmp_path / "killed", **options)
    resumed.train(resume_from_checkpoint=True)
    weights = [tiny.role_weights(run.model, Role.POLICY) for run in (whole, resumed)]
    assert tiny.same(*weights)
    history = [tiny.comparable(run.state.log_history[:-1]) for run in (whole, resumed)]
    assert [{k: v for k, v in e.items() if k != "eval_model_preparation_time"} for e in history[0]] == [
        {k: v for k, v in e.items() if k != "eval_model_preparation_time"} for e in history[1]
    ]


def test_evaluation_does_not_depend_on_the_batches(world, tmp_path):
    found = []
    for size in (1, 3, 8):
        run = trainer(world, tmp_path, per_device_eval_batch_size=size, eval_dataset=ranked(7), beta=0.2)
        found.append(run.evaluate())
    names = ["loss", "rank_loss", "sft_loss", "kl_loss", "ranking_accuracy", "kendall_tau", "perplexity_best", "pairs"]
    for name in names:
        values = [metrics[f"eval_{name}"] for metrics in found]
        assert values == pytest.approx([values[0]] * 3, rel=1e-4), name


def test_evaluation_by_name_chooses_the_best_checkpoint(world, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "held_out_ranking_accuracy"}
    options |= {"greater_is_better": True, "eval_dataset": {"held_out": ranked(6), "own": chats(3)}}
    run = trainer(world, tmp_path, **options)
    run.train()
    accuracies = [e["eval_held_out_ranking_accuracy"] for e in run.state.log_history if "eval_held_out_loss" in e]
    assert len(accuracies) == 3
    assert run.state.best_metric == max(accuracies)
    assert sum("eval_own_perplexity_best" in entry for entry in run.state.log_history) == 3
    again = run.evaluate(run.eval_dataset["held_out"], metric_key_prefix="eval_held_out")
    assert again["eval_held_out_ranking_accuracy"] == pytest.approx(run.state.best_metric)


def test_conversations_are_trained_on(world, tmp_path):
    run = trainer(world, tmp_path, dataset=chats(), eval_dataset=chats(3))
    run.train()
    assert run.state.log_history[0]["rank_loss"] > 0
    assert run.evaluate()["eval_perplexity_best"] > 1


# ---------------------------------------------------------------------- what it takes


def test_every_kind_of_model(world, tmp_path):
    base = str(world / "base")
    peft_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), world / "policy")
    kinds = {
        "id": (base, tiny.lora()),
        "PreTrainedModel": (AutoModelForCausalLM.from_pretrained(base), tiny.lora()),
        "PeftModel": (peft_model, None),
        "SharedBaseModel": (tuned(world), None),
    }
    losses = {}
    for name, (model, peft_config) in kinds.items():
        run = trainer(world, tmp_path, model=model, peft_config=peft_config, beta=0.1)
        assert isinstance(run.model, SharedBaseModel)
        assert not run.model.has_role(Role.CRITIC)
        run.train()
        losses[name] = run.state.log_history[0]["loss"]
    assert losses["id"] == pytest.approx(losses["PreTrainedModel"], rel=1e-5)
    assert losses["PeftModel"] == pytest.approx(losses["SharedBaseModel"], rel=1e-5)
    assert losses["id"] != pytest.approx(losses["PeftModel"], rel=1e-3)


def test_a_base_in_four_bits(tmp_path):
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32}  # 4-bit kernels want multiples of 32
    LlamaForCausalLM(tiny.tiny_config(**sizes)).save_pretrained(tmp_path / "base")
    run = RRHFTrainer(
        str(tmp_path / "base"),
        config(tmp_path, beta=0.1, gradient_checkpointing=True),
        ranked(),
        processing_class=tiny.tiny_tokenizer(),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        peft_config=tiny.lora(),
    )
    assert run.model.is_loaded_in_4bit
    assert run.share_prompts
    before = tiny.role_weights(run.model, Role.POLICY)
    run.train()
    assert run.state.log_history[0]["kl"] == 0
    assert not tiny.same(before, tiny.role_weights(run.model, Role.POLICY))


def test_a_model_that_cannot_share_prompts_warns_and_trains(world, tmp_path):
    torch.manual_seed(0)
    bloom = BloomForCausalLM(
        BloomConfig(vocab_size=len(tiny.SPECIAL + tiny.WORDS), hidden_size=16, n_layer=1, n_head=2)
    )
    with pytest.warns(UserWarning, match="cannot compute the responses to a prompt in one sequence"):
        run = trainer(
            world, tmp_path, model=bloom, peft_config=tiny.lora(), processing_class=tiny.tiny_tokenizer(), beta=0.1
        )
    assert not run.share_prompts
    _, sft, _ = by_hand(run, ranked_rows())
    run.state.global_step = 1
    run.compute_loss(run.model, batch(run))
    metrics = run.running_means["train" if run.model.training else "eval"].take(lambda x: x, torch.device("cpu"))
    assert metrics["sft_loss"] == pytest.approx(sft.item(), abs=1e-3)
    run.train()


def test_dropout_is_off_unless_asked_for(world, tmp_path):
    for disable in (True, False):
        model = AutoModelForCausalLM.from_pretrained(str(world / "base"))
        run = trainer(
            world, tmp_path, model=model, peft_config=tiny.lora(lora_dropout=0.5), disable_dropout=disable, seed=1
        )
        with torch.no_grad():  # or dropout of the adapter changes nothing
            for name, parameter in run.model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.1)
        run.model.train()
        losses = {run.compute_loss(run.model, batch(run)).item() for _ in range(2)}
        assert (len(losses) == 1) is disable


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward_funcs": count_w3}, "reward_funcs score responses that are sampled online"),
        ({"max_length": 65}, "max_length=65 exceeds the model's 64 positions"),
        ({"eval_dataset": Dataset.from_dict({"prompt": ["w1"]})}, "eval_dataset has no column responses, scores"),
        ({"eval_dataset": {"x": ranked(0)}}, r"eval_dataset\['x'\]"),
        ({"online_every_steps": 2}, "nothing that scores responses"),
        ({"online_every_pass": True, "reward_funcs": count_w3, "reward_weights": [1.0, 2.0]}, "2 numbers for 1"),
    ],
)
def test_bad_input_is_named(world, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(world, tmp_path, **options)


# ---------------------------------------------------------------------- what it leaves


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    run = trainer(world, tmp_path_factory.mktemp("my-policy"), beta=0.25, max_steps=3)
    run.train()
    run.save_model()
    return run


def check_card(text, base):
    header = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])
    assert header["library_name"] == "peft"
    assert {"rrhf", "trl_ext"} <= set(header["tags"])
    assert f"`{Path(base).name}`" in text
    assert str(Path(base).parent) not in text  # no folder of this machine
    assert "2304.05302" in text
    assert "| `beta` | 0.25 |" in text
    assert "| 3 |" in text  # the last step of the course


def test_the_saved_policy_loads_with_plain_peft(finished, world):
    folder = finished.args.output_dir
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([[6, 7, 8, 9, 1]])
    with torch.no_grad(), finished.model.eval().role(Role.POLICY):
        torch.testing.assert_close(loaded(ids).logits, finished.model(input_ids=ids).logits, rtol=0, atol=1e-5)
    with open(f"{folder}/README.md", encoding="utf-8") as file:
        check_card(file.read(), str(world / "base"))


def test_what_is_pushed_is_the_adapter_with_our_card(finished, world, monkeypatch):
    uploads = []

    class Hub:
        def create_repo(self, repo_id, **kwargs):
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, **kwargs):
            with open(f"{kwargs['folder_path']}/README.md", encoding="utf-8") as file:
                uploads.append((kwargs["repo_id"], file.read()))

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    finished.hub_model_id = "me/rrhf"
    finished.push_to_hub(dataset_name="me/ranked", tags="mine")
    ((repo, card),) = uploads
    assert repo == "me/rrhf"
    check_card(card, str(world / "base"))
    assert "- me/ranked" in card
    assert "- mine" in card


def test_the_default_folder_is_named_after_the_model(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = RRHFTrainer(tuned(world), train_dataset=ranked())
    assert run.args.output_dir == "base-RRHF"
    assert config(tmp_path).output_dir == str(tmp_path)
