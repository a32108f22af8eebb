"""One answer, one score: from the training of a reward model through PPO and RRHF to the evaluation, on real templates.

Each part is tested alone elsewhere; the faults of chat templates lay between the parts.
"""

import string

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForSequenceClassification
from transformers import GenerationConfig, LlamaForCausalLM

from tests import chat
from tests.ppo import tiny
from tests.reward import runs
from tests.rrhf import ranked
from trl_ext import SharedBaseModel
from trl_ext.report.evaluation import evaluate_policy
from trl_ext.roles import read_adapter
from trl_ext.rrhf.data import collate
from trl_ext.scoring import ResponseScorer

TEMPLATES = {
    "chatml": (chat.CHATML, "<|im_end|>", {}),
    "chatml, pad is eos": (chat.CHATML, "<|im_end|>", {"pad_token": "<|im_end|>"}),
    "gemma3": ((chat.TEMPLATES / "gemma3.jinja").read_text(encoding="utf-8"), "<end_of_turn>", {}),
    "phi3": ((chat.TEMPLATES / "phi3.jinja").read_text(encoding="utf-8"), "<|end|>", {}),
    "qwen3": ((chat.TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8"), "<|im_end|>", {}),
    "llama3": ((chat.TEMPLATES / "llama3.jinja").read_text(encoding="utf-8"), "<|eot_id|>", {}),
}
QUESTIONS = ["Hi", "Why?", "Who are you", "Sing"]


FAST = ("chatml, pad is eos", "qwen3")


@pytest.fixture(
    scope="module",
    params=[name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in TEMPLATES],
)
def world(request, tmp_path_factory):
    """A base and a reward adapter trained on conversations by `RewardModelTrainer`."""
    template, eos, options = TEMPLATES[request.param]
    folder = tmp_path_factory.mktemp("world")
    tokenizer = chat.tokenizer_of(template, eos, **options)
    config = tiny.tiny_config(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 256
    torch.manual_seed(0)
    base = LlamaForCausalLM(config)
    # Samples are letters and the end token, so that their text reads back as their ids
    base.generation_config.suppress_tokens = [
        i
        for i in range(len(tokenizer))
        if i != tokenizer.eos_token_id and tokenizer.decode([i]) not in string.ascii_letters
    ]
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rows = []
    for i, question in enumerate(QUESTIONS):
        turns = [[{"role": "assistant", "content": text}] for text in (f"Yes{i}", f"No, not {i}")]
        rows.append({"prompt": conversation(question), "chosen": turns[0], "rejected": turns[1]})
    trainer = runs.trainer(folder / "base", folder / "reward", dataset=Dataset.from_list(rows), max_steps=4)
    trainer.train()
    trainer.save_model()
    return folder, tokenizer


def conversation(question):
    return [{"role": "user", "content": question}]


def scored_as_in_training(world, prompts, texts):
    """Plain PEFT on conversations rendered by the template, on the scale stored with the adapter."""
    folder, tokenizer = world
    model = AutoPeftModelForSequenceClassification.from_pretrained(folder / "reward", num_labels=1).eval()
    model.config.pad_token_id = tokenizer.pad_token_id
    scale, scores = read_adapter(folder / "reward").scale, []
    for prompt, text in zip(prompts, texts, strict=True):
        messages = [*prompt, {"role": "assistant", "content": text}]
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            scores.append((model(**ids).logits[0, 0].item() - scale.mean) / scale.std)
    return scores


def ended(tokenizer, ids):
    return [i for i, sequence in enumerate(ids) if sequence[-1] == tokenizer.eos_token_id]


def shared(world, with_critic):
    folder, _ = world
    return SharedBaseModel.from_pretrained(
        str(folder / "base"), reward_adapter=folder / "reward", with_critic=with_critic, peft_config=tiny.lora()
    )


def test_ppo_scores_a_sample_as_it_was_trained(world, tmp_path):
    folder, tokenizer = world
    prompts = Dataset.from_dict({"prompt": [conversation(question) for question in QUESTIONS * 4]})
    trainer = tiny.trainer(
        folder, tmp_path, model=shared(world, True), dataset=prompts, max_completion_length=12,
        per_device_train_batch_size=16, log_completions=True,
        generation_kwargs={"suppress_tokens": suppressed(world)},
    )  # fmt: skip
    seen = []
    collect = trainer._generate_and_score_completions

    def spy(inputs):
        batch = collect(inputs)
        seen.append(batch)
        return batch

    trainer._generate_and_score_completions = spy
    trainer.train()
    logs = trainer._logs
    texts = [completion[0]["content"] for completion in logs["completion"]]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    batch = seen[-1]
    rows = [
        row[mask.bool()].tolist() for row, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    ]
    assert all(tokenizer.eos_token_id not in row[:-1] for row in rows)  # nothing behind the end token is trained
    whole = ended(tokenizer, rows)
    assert whole, "no sample ended"
    assert all(rows[i][:-1] == ids[-len(rows) :][i] for i in whole)
    expected = scored_as_in_training(world, list(logs["prompt"])[-len(rows) :], texts[-len(rows) :])
    got = logs["rewards"]["total"]
    assert [list(got)[-len(rows) :][i] for i in whole] == pytest.approx([expected[i] for i in whole], abs=1e-3)


def suppressed(world):
    return GenerationConfig.from_pretrained(world[0] / "base").suppress_tokens


def test_rrhf_scores_samples_and_written_responses_as_they_were_trained(world, tmp_path):
    folder, tokenizer = world
    rows = Dataset.from_dict({"prompt": [conversation(question) for question in QUESTIONS]})
    run = ranked.trainer(
        folder, tmp_path, model=shared(world, False), dataset=rows, online_every_steps=2, num_online_responses=3,
        max_completion_length=12, max_length=256,
    )  # fmt: skip
    new, _ = run.sampler.resample(collate(list(run.train_dataset))["rows"], seed=1)
    written = [run.encoder.response_ids(row.prompt, "Yes") for row in new]
    scorer = ResponseScorer(run.model, tokenizer)
    expected = scored_as_in_training(world, [row.prompt for row in new], ["Yes"] * len(new))
    assert scorer(list(zip(new, written, strict=True))) == pytest.approx(expected, abs=1e-3)


def test_the_evaluation_of_a_policy_scores_as_it_was_trained(world):
    _, tokenizer = world
    model = shared(world, False)
    prompts = Dataset.from_dict({"prompt": [conversation(question) for question in QUESTIONS]})
    scorer, seen = ResponseScorer(model, tokenizer), []

    def spy(samples):
        seen.extend(samples)
        return scorer(samples)

    forward = model.generate

    def letters_only(*args, generation_config, **kwargs):
        generation_config.suppress_tokens = suppressed(world)
        return forward(*args, generation_config=generation_config, **kwargs)

    model.generate = letters_only
    metrics, texts = evaluate_policy(model, tokenizer, prompts, spy, max_new_tokens=100)
    whole = ended(tokenizer, [ids for _, ids in seen])
    expected = scored_as_in_training(world, [row.prompt for row, _ in seen], texts)
    scores = scorer(seen)
    assert whole
    assert [scores[i] for i in whole] == pytest.approx([expected[i] for i in whole], abs=1e-3)
    assert metrics["reward"] == pytest.approx(sum(scores) / len(scores))
