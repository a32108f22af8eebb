"""What tasks told in words share: a tokenizer of whole words, a tiny Llama, its pretraining, and turns."""

import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from filelock import FileLock
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
BATCH, LEARNING_RATE, WARMUP = 16, 5e-3, 50  # of the pretraining


@dataclass(frozen=True)
class WordsWorld:
    """A base and the prompts of a task.

    base: folder of the pretrained causal language model and its tokenizer.
    train_prompts, eval_prompts: column "prompt".
    """

    base: Path
    train_prompts: Dataset
    eval_prompts: Dataset

    def write(self, folder: Path) -> None:
        """Write `base/`, `train.jsonl` and `test.jsonl`."""
        shutil.copytree(self.base, folder / "base", dirs_exist_ok=True)
        for name, prompts in (("train", self.train_prompts), ("test", self.eval_prompts)):
            lines = (json.dumps({"prompt": prompt}) for prompt in prompts["prompt"])
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token for each word; any text of these words comes back exactly."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL_TOKENS, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
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
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, sample: Callable[[], tuple[str, str]], steps: int
) -> float:
    """Teach a model some texts, completions only, by AdamW with a cosine; a plain loop, on any device.

    Args:
        sample: A prompt and its completion, all of one length in tokens.
        steps: Of 16 texts each.

    Returns:
        The last loss, nats a token.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    loss = math.inf
    model.train()
    bar = tqdm(range(steps), desc="pretraining", unit="step")
    for step in bar:
        warm, left = min((step + 1) / WARMUP, 1.0), 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * warm * left
        texts = [sample() for _ in range(BATCH)]
        whole = [f"{prompt}{completion} {tokenizer.eos_token}" for prompt, completion in texts]
        ids = torch.tensor(tokenizer(whole)["input_ids"], device=model.device)
        labels = ids.clone()
        labels[:, : len(texts[0][0].split())] = -100
        found = model(input_ids=ids, labels=labels).loss
        found.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss = float(found.detach())
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    model.eval()
    return loss


def build_base(
    output_dir: str | os.PathLike[str],
    source: str,
    words: Sequence[str],
    sample: Callable[[], tuple[str, str]],
    seed: int,
    steps: int,
) -> Path:
    """Pretrain a base under `output_dir`, or find it there.

    It lies in a folder named after the task's file, the seed, the number of steps, and a hash of the code and the
    libraries. Several processes may call it: one builds, the others wait.

    Args:
        output_dir: folder; created if missing.
        source: file of the task.
        words: of its texts.
        sample: see `pretrain`.
        seed: of the weights.
        steps: of the pretraining.

    Raises:
        ValueError: fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    digest = hashlib.sha256(Path(source).read_bytes() + Path(__file__).read_bytes())
    for library in ("torch", "transformers"):
        digest.update(f"{library}={importlib.metadata.version(library)}".encode())
    name = f"{Path(source).stem}-seed{seed}-steps{steps}-{digest.hexdigest()[:8]}"
    base = Path(output_dir).resolve() / name
    base.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{base}.lock"):
        if not base.exists():
            tokenizer = word_tokenizer(words)
            model = build_model(tokenizer, seed)
            pretrain(model, tokenizer, sample, steps)
            scratch = Path(tempfile.mkdtemp(dir=base.parent, prefix=".unfinished-"))
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
            scratch.rename(base)
    return base


@torch.no_grad()
def take_turns(
    prompts: Sequence[str], trainer: Any, say: Callable[[str, list[str]], str], turns: int, last: int
) -> dict[str, Any]:
    """Let an environment and the policy write by turns: a `rollout_func` without its task.

    The policy writes two tokens a turn, and after all turns the end.

    Args:
        prompts: of as many tokens each.
        trainer: with `model`, `processing_class` and `temperature`.
        say: what the environment says to a prompt and the first words of the policy's answers so far; of as many tokens
            for each prompt.
        turns: number of turns.
        last: tokens of the end, at most.

    Returns:
        `prompt_ids`, `completion_ids`, `logprobs` (None) and `env_mask`, a list for each prompt.
    """
    model, tokenizer = trainer.model, trainer.processing_class
    training = model.training
    starts = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    answers: list[list[str]] = [[] for _ in prompts]
    ids: list[list[int]] = [[] for _ in prompts]
    masks: list[list[int]] = [[] for _ in prompts]
    open_rows = list(range(len(prompts)))
    model.eval()
    for turn in range(turns + 1):
        if not open_rows:
            break
        for i in open_rows if turn < turns else ():
            said = tokenizer(say(prompts[i], answers[i]))["input_ids"]
            ids[i] += said
            masks[i] += [0] * len(said)
        rows = torch.tensor([starts[i] + ids[i] for i in open_rows], device=model.device)
        options = {
            "do_sample": True,
            "temperature": trainer.temperature,
            "top_k": 0,
            "max_new_tokens": 2 if turn < turns else last,
        }
        written = model.generate(input_ids=rows, attention_mask=torch.ones_like(rows), **options)[:, rows.shape[1] :]
        for i, answer in zip(list(open_rows), written.tolist(), strict=True):
            if tokenizer.eos_token_id in answer:
                answer = answer[: answer.index(tokenizer.eos_token_id) + 1]
                open_rows.remove(i)
            ids[i] += answer
            masks[i] += [1] * len(answer)
            answers[i].append(tokenizer.decode(answer[:1]))
    model.train(training)
    return {"prompt_ids": starts, "completion_ids": ids, "logprobs": None, "env_mask": masks}
