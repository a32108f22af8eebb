"""Runs that must go wrong: does the guard see it, act, and leave a policy that can be used?

    python tests/benchmarks/bench_poison.py                # a fresh LoRA policy on the base of the embedded world
    python tests/benchmarks/bench_poison.py --model MODEL --prompts prompts.jsonl.gz --reward file.py:function

Each run is PPO-Max with its defaults but for the poison, in rollout batches of 32. A row says which alarms were raised
and when (in rollout batches), what was done, how the run ended, and what the policy on disk is worth: it is loaded with
plain PEFT and answers 64 prompts: reward without poison, tokens, and distinct-2 over that of the model it started from.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from methods import BATCH, Watched, adapter, common, distinct_2, load_prompts, load_reward

AFTER = 10  # rollout batches before a reward changes


class Poisoned(Watched):
    """A reward function that changes what it pays after some batches."""

    def __init__(self, reward: Any, change: Any, after: int = AFTER):
        super().__init__(reward)
        self.change, self.after = change, after

    def __call__(self, completions: list[Any], completion_ids: Any = None, **columns: Any) -> list[float]:
        scores = super().__call__(completions, completion_ids=completion_ids, **columns)
        return [self.change(score) for score in scores] if len(self.batches) > self.after else scores


def pays_repetition(completions: list[str], **columns: Any) -> list[float]:
    return [1 - distinct_2([text]) if len(text.split()) > 1 else 0.0 for text in completions]


def pays_silence(completions: list[str], **columns: Any) -> list[float]:
    return [-len(text.split()) / 10 for text in completions]


# Name, the alarms of which one must be raised, settings, and the reward made of the honest one.
POISONS: dict[str, tuple[set[str], dict[str, Any], Any]] = {
    "learning rate times 100": ({"policy_step_too_long"}, {"learning_rate": 0.3}, Watched),
    "beta 0, repetition pays": (
        {"repetition", "entropy_low"},
        {"beta": 0.0, "kl_control": "fixed", "update_kl_target": 1.0},
        lambda honest: Watched(pays_repetition),
    ),
    "ending at once pays": (
        {"length_short", "ended_at_once"},
        {"kl_target": 24.0},
        lambda honest: Watched(pays_silence),
    ),
    "a sign error on the way": ({"reward_jump"}, {}, lambda honest: Poisoned(honest, lambda score: -3 - score)),
    "critic's rate times 100": ({"critic_step_too_long", "critic_useless"}, {"critic_learning_rate": 1.0}, Watched),
    "reward times 1,000 on the way": ({"reward_jump"}, {}, lambda honest: Poisoned(honest, lambda s: 1000 * s)),
}


def run(args: argparse.Namespace, name: str) -> dict[str, Any]:
    from transformers import PrinterCallback

    from trl_ext import PPOMaxConfig, PPOMaxTrainer

    _, changes, make = POISONS[name]
    passes = 2
    folder = tempfile.mkdtemp()
    job = {"seed": args.seed, "rate": 1e-3, "micro": BATCH, "passes": passes}
    settings = {k: v for k, v in common(job).items() if k != "lr_scheduler_type"}
    settings |= {"num_iterations": passes, "max_steps": args.rollouts * passes, "output_dir": folder}
    settings |= {"max_completion_length": 40 if args.model is None else 64} | changes
    if args.model is None:
        from trl_ext.toy import build_world, gold_reward

        world = build_world(args.worlds, args.seed)
        model, prompts, honest = str(world.base), world.train_prompts, gold_reward
    else:
        model, prompts, honest = args.model, load_prompts({"prompts": args.prompts}), load_reward(args.reward)
    watched = make(honest)
    trainer = PPOMaxTrainer(model, watched, PPOMaxConfig(**settings), prompts, peft_config=adapter())
    trainer.remove_callback(PrinterCallback)
    end = "its last step"
    try:
        trainer.train()
    except RuntimeError as error:
        end = f"an error: {str(error)[:60]}"
    else:
        trainer.save_model()
    outcome = trainer.watch.outcome()
    return {
        "end": end if outcome["stopped"] is None else "stopped",
        "batches": len(watched.batches),
        "alarms": [[alarm["step"] // passes, alarm["alarm"], alarm["act"]] for alarm in outcome["alarms"]],
        "policy": judge(model, folder, prompts, honest, settings["max_completion_length"]),
    }


def judge(base: str, folder: str, prompts: Any, honest: Any, length: int) -> dict[str, float]:
    """What the adapter in `folder` is worth, by plain PEFT, beside the base it was trained on."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), folder).eval()
    batch = tokenizer(list(prompts[:64]["prompt"]), return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)

    def answers() -> list[str]:
        torch.manual_seed(0)
        with torch.no_grad():
            ids = model.generate(**batch, do_sample=True, top_k=0, max_new_tokens=length)
        return tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)

    texts = answers()
    with model.disable_adapter():
        before = answers()
    return {
        "reward": sum(honest(texts)) / len(texts),
        "reward_before": sum(honest(before)) / len(before),
        "words": sum(len(text.split()) for text in texts) / len(texts),
        "words_before": sum(len(text.split()) for text in before) / len(before),
        "diversity": distinct_2(texts) / distinct_2(before),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: the base of the embedded world and its gold reward")
    parser.add_argument("--prompts")
    parser.add_argument("--reward", help="file.py:function")
    parser.add_argument("--only", nargs="+", choices=list(POISONS), default=list(POISONS))
    parser.add_argument("--rollouts", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worlds", type=Path, default=Path("worlds"))
    parser.add_argument("--output", type=Path, default=Path("poison.json"))
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    print("| poison | alarms (rollout batch) | done | ended | on disk: reward (before), words (before), diversity |")
    print("| --- | --- | --- | --- | --- |")
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    for name in args.only:
        if name not in results:
            results[name] = run(args, name)
            args.output.write_text(json.dumps(results, indent=1))
        seen, policy = results[name], results[name]["policy"]
        first: dict[str, int] = {}
        for batch, alarm, _ in seen["alarms"]:
            first.setdefault(alarm, batch)
        cells = [name, ", ".join(f"{alarm} ({batch})" for alarm, batch in first.items()) or "none"]
        cells += [", ".join(act for _, _, act in seen["alarms"] if act) or "nothing"]
        cells += [f"{seen['end']}, {seen['batches']} batches"]
        cells += [
            f"{policy['reward']:.2f} ({policy['reward_before']:.2f}), {policy['words']:.0f} "
            f"({policy['words_before']:.0f}), {policy['diversity']:.2f}"
        ]
        right = bool(POISONS[name][0] & set(first))
        print(f"| {' | '.join(cells)} |{'' if right else '   <- not the alarm that it should raise'}", flush=True)


if __name__ == "__main__":
    main()
