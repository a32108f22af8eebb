"""A task where credit matters: a sum of many steps, told in words, with one reward at the end.

A prompt starts from a digit and names a step by each letter; a completion works them out, modulo 10:

    start 9 a add 3 b take 1 c add 2 :
    a 9 add 3 makes 2 . b 2 take 1 makes 1 . c 1 add 2 makes 3 . answer 3

With 14 steps a completion has 101 tokens, and the model that was pretrained on careless demonstrations, of which every
eighth step or so goes wrong, is right at the end in about one of five. Where it went wrong the value falls from one
token to the next; a method that gives all tokens of a completion the same advantage has to find that out by averaging.

`solved` pays 1 for the right answer, at the end. `step_rewards` pays each right step where it is written. With
`in_turns` as the trainer's `rollout_func` an environment tells the steps, and the policy writes their results alone.

    python -m trl_ext.toy.sums runs/sums

builds the base and the prompts in a few minutes on two CPU cores, and `trl-ext ppo-max --config sums` trains on them.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from filelock import FileLock
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

STEPS, LARGEST = 14, 3  # of a sum; number that is added or taken
MISTAKES = 0.12  # share of the demonstrations' steps that go wrong
LETTERS = "abcdefghijklmn"
OPERATIONS = {"add": 1, "take": -1}
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
VOCABULARY = (*SPECIAL_TOKENS, *"0123456789", *LETTERS, *OPERATIONS, "start", "makes", "answer", ".", ":")
TRAIN_PROMPTS, EVAL_PROMPTS = 4096, 256
PRETRAINING_STEPS, BATCH, LEARNING_RATE, WARMUP = 800, 16, 5e-3, 50


@dataclass(frozen=True)
class SumsWorld:
    """What `build_sums` made.

    base: folder of the pretrained causal language model and its tokenizer.
    train_prompts, eval_prompts: column "prompt", no prompt in both.
    """

    base: Path
    train_prompts: Dataset
    eval_prompts: Dataset


# ---------------------------------------------------------------------- the task


def make_prompt(rng: random.Random, steps: int = STEPS) -> str:
    """A prompt of so many steps."""
    told = (f"{letter} {rng.choice(list(OPERATIONS))} {rng.randint(1, LARGEST)}" for letter in LETTERS[:steps])
    return f"start {rng.randrange(10)} {' '.join(told)} :"


def read_prompt(prompt: str) -> tuple[int, list[tuple[str, str, int]]]:
    """Where a sum starts, and its steps: letter, operation, number."""
    words = prompt.split()
    told = words[2:-1]
    return int(words[1]), [(told[i], told[i + 1], int(told[i + 2])) for i in range(0, len(told), 3)]


def _result(total: int, operation: str, number: int) -> int:
    return (total + OPERATIONS[operation] * number) % 10


def right_answer(prompt: str) -> int:
    """The last digit of the sum."""
    total, steps = read_prompt(prompt)
    for _, operation, number in steps:
        total = _result(total, operation, number)
    return total


def demonstration(prompt: str, rng: random.Random, mistakes: float = MISTAKES) -> str:
    """A completion of which each step goes wrong with this chance; those after it go on from what was written."""
    total, steps = read_prompt(prompt)
    told = []
    for letter, operation, number in steps:
        made = _result(total, operation, number)
        if rng.random() < mistakes:
            made = (made + rng.randrange(1, 10)) % 10
        told.append(f"{letter} {total} {operation} {number} makes {made} .")
        total = made
    return f" {' '.join(told)} answer {total}"


# ---------------------------------------------------------------------- rewards


def solved(prompts: Sequence[str], completions: Sequence[str], **kwargs: Any) -> list[float]:
    """1 for a completion that ends with the right answer, else 0."""
    pairs = zip(prompts, completions, strict=True)
    return [float(completion.split()[-2:] == ["answer", str(right_answer(prompt))]) for prompt, completion in pairs]


def step_rewards(prompts: Sequence[str], completions: Sequence[str], **kwargs: Any) -> list[dict[str, Any]]:
    """For each right step an equal share of 1, paid where its result is written.

    A step is right if it is the prompt's, goes on from the result before it, and computes what it says. All steps right
    and the answer copied is the right answer.
    """
    return [{"characters": _right_steps(p, c)} for p, c in zip(prompts, completions, strict=True)]


def _right_steps(prompt: str, completion: str) -> list[tuple[int, int, float]]:
    total, steps = read_prompt(prompt)
    spans, place = [], 0
    for (letter, operation, number), told in zip(steps, completion.split(" ."), strict=False):
        words = told.split()
        start, end = place + len(told) - len(told.lstrip()), place + len(told)
        if words == [letter, str(total), operation, str(number), "makes", str(_result(total, operation, number))]:
            spans.append((start, end, 1 / len(steps)))
        if not words or not words[-1].isdigit():
            break  # from here on it is no sum
        total = int(words[-1])
        place = end + len(" .")
    return spans


# ---------------------------------------------------------------------- in several turns


@torch.no_grad()
def in_turns(prompts: Sequence[str], trainer: Any) -> dict[str, Any]:
    """A `rollout_func`: the environment tells each step, and the policy writes its result, two tokens a turn.

    The text is that of `demonstration`, so that the base and the rewards are the same. "answer 3 <eos>" is all the
    policy's.

    Args:
        prompts: of as many steps each.
        trainer: with `model`, `processing_class` and `temperature`.

    Returns:
        `prompt_ids`, `completion_ids`, `logprobs` (None) and `env_mask`, a list for each prompt.
    """
    model, tokenizer = trainer.model, trainer.processing_class
    training = model.training
    starts = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    sums = [read_prompt(prompt) for prompt in prompts]
    totals = [str(start) for start, _ in sums]
    ids: list[list[int]] = [[] for _ in prompts]
    masks: list[list[int]] = [[] for _ in prompts]
    open_rows = list(range(len(prompts)))
    model.eval()
    for turn in range(len(sums[0][1]) + 1):
        last = turn == len(sums[0][1])
        for i in open_rows if not last else ():
            letter, operation, number = sums[i][1][turn]
            said = tokenizer(f"{letter} {totals[i]} {operation} {number} makes")["input_ids"]
            ids[i] += said
            masks[i] += [0] * len(said)
        if not open_rows:
            break
        rows = torch.tensor([starts[i] + ids[i] for i in open_rows], device=trainer.model.device)
        options = {
            "do_sample": True,
            "temperature": trainer.temperature,
            "top_k": 0,
            "max_new_tokens": 3 if last else 2,
        }
        written = model.generate(input_ids=rows, attention_mask=torch.ones_like(rows), **options)[:, rows.shape[1] :]
        for i, answer in zip(list(open_rows), written.tolist(), strict=True):
            if tokenizer.eos_token_id in answer:
                answer = answer[: answer.index(tokenizer.eos_token_id) + 1]
                open_rows.remove(i)
            ids[i] += answer
            masks[i] += [1] * len(answer)
            word = tokenizer.decode(answer[:1])
            totals[i] = word if word.isdigit() else totals[i]
    model.train(training)
    return {"prompt_ids": starts, "completion_ids": ids, "logprobs": None, "env_mask": masks}


# ---------------------------------------------------------------------- the model


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word; any text of the task comes back exactly."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """A Llama of about 0.1 million random float32 weights; the global random state is left as it was."""
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.05,
        dtype="float32",
        **special,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config.update(**special)
    return model


def pretrain(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, seed: int, steps: int = PRETRAINING_STEPS
) -> float:
    """Teach a model the demonstrations, completions only, by AdamW with a cosine; a plain loop, on any device.

    Returns:
        The last loss, nats a token.
    """
    rng = random.Random(f"sums-{seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    loss = math.inf
    model.train()
    bar = tqdm(range(steps), desc="pretraining on sums", unit="step")
    for step in bar:
        warm, left = min((step + 1) / WARMUP, 1.0), 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * warm * left
        prompts = [make_prompt(rng) for _ in range(BATCH)]
        texts = [f"{prompt}{demonstration(prompt, rng)} {tokenizer.eos_token}" for prompt in prompts]
        ids = torch.tensor(tokenizer(texts)["input_ids"], device=model.device)  # all of one length
        labels = ids.clone()
        labels[:, : len(prompts[0].split())] = -100
        found = model(input_ids=ids, labels=labels).loss
        found.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss = float(found.detach())
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    model.eval()
    return loss


def build_sums(output_dir: str | os.PathLike[str], seed: int = 0, *, steps: int = PRETRAINING_STEPS) -> SumsWorld:
    """Build the base and the prompts under `output_dir`, or load them if they are there.

    The base lies in a folder named after the seed, the number of steps, and a hash of this file and the libraries.
    Several processes may call it: one builds, the others wait and load.

    Args:
        output_dir: folder; created if missing.
        seed: of the weights, the demonstrations and the prompts.
        steps: of the pretraining; few are for tests.

    Raises:
        ValueError: fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    base = Path(output_dir).resolve() / f"sums-seed{seed}-steps{steps}-{_version()}"
    base.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{base}.lock"):
        if not base.exists():
            tokenizer = build_tokenizer()
            model = build_model(tokenizer, seed)
            pretrain(model, tokenizer, seed, steps)
            scratch = Path(tempfile.mkdtemp(dir=base.parent, prefix=".unfinished-"))
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
            scratch.rename(base)
    rng = random.Random(f"prompts-{seed}")
    prompts = list(dict.fromkeys(make_prompt(rng) for _ in range(TRAIN_PROMPTS + EVAL_PROMPTS)))
    train, test = prompts[EVAL_PROMPTS:], prompts[:EVAL_PROMPTS]
    return SumsWorld(base, Dataset.from_dict({"prompt": train}), Dataset.from_dict({"prompt": test}))


def _version() -> str:
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for library in ("torch", "transformers"):
        digest.update(f"{library}={importlib.metadata.version(library)}".encode())
    return digest.hexdigest()[:8]


def main(arguments: list[str]) -> None:
    """Write `base/`, `train.jsonl` and `test.jsonl` into a folder."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise SystemExit("usage: python -m trl_ext.toy.sums FOLDER")
    folder = Path(arguments[0])
    world = build_sums(folder)
    shutil.copytree(world.base, folder / "base", dirs_exist_ok=True)
    for name, prompts in (("train", world.train_prompts), ("test", world.eval_prompts)):
        lines = (json.dumps({"prompt": prompt}) for prompt in prompts["prompt"])
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    print(f"base and prompts: {folder.resolve()}\ntrain with         trl-ext ppo-max --config sums")


if __name__ == "__main__":
    main(sys.argv[1:])
