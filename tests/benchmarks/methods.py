"""The methods that the learning benchmarks compare, each trained on so many samples of the same prompts.

A method leaves "records", one of every rollout batch: "reward", "kl" (nats a completion), "length" (tokens),
"diversity". Batches of 32 completions, LoRA r=16 on all linear layers, a constant learning rate for TRL's trainers.

`python methods.py JOB.json RESULT.json` runs one in a process of its own; TRL 1.12 has an environment of its own, too.
A job is `{"method", "model", "prompts", "reward": "file.py:function", "seed", "samples", "length", "passes", "micro",
"rate", "settings"}`: `micro` completions make an optimizer step, `settings` are fields of the method's configuration.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

BATCH = 32


def load_prompts(job: dict[str, Any]) -> Any:
    """A dataset of one column, `prompt`; of pairs and of conversations it is what comes before the answer."""
    from datasets import load_dataset

    prompts = load_dataset("json", data_files=job["prompts"], split="train")
    return prompts.remove_columns([column for column in prompts.column_names if column != "prompt"])


def load_reward(spec: str) -> Any:
    import importlib.util

    file, _, name = spec.rpartition(":")
    found = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return getattr(module, name)


def text_of(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def distinct_2(texts: list[str]) -> float:
    """Different pairs of neighbouring words / pairs of neighbouring words, over all texts together (Li et al. 2016).

    That of `trl_ext.report.evaluation`, which the environment of TRL 1.12 does not have.
    """
    pairs = [pair for text in texts for pair in pairwise(text.split())]
    return len(set(pairs)) / max(len(pairs), 1)


class Watched:
    """A reward function that keeps mean reward, distinct-2 and, where it is told the ids, mean length of each batch.

    Without a reward function it gives 0: something else scores, and it only watches.
    """

    def __init__(self, reward: Any = None):
        self.reward, self.batches = reward, []
        self.__name__ = "reward" if reward is not None else "diversity"

    def __call__(self, completions: list[Any], completion_ids: Any = None, **columns: Any) -> list[float]:
        scores = [0.0] * len(completions) if self.reward is None else self.reward(completions, **columns)
        batch = {"reward": sum(scores) / len(scores), "diversity": distinct_2([text_of(c) for c in completions])}
        if completion_ids is not None:
            batch["length"] = sum(map(len, completion_ids)) / len(completion_ids)
        self.batches.append(batch)
        return list(scores)

    def records(self, kl: list[float], length: float) -> list[dict[str, float]]:
        """One for each batch of `kl`; `length` where the function was not told."""
        return [{"length": length} | batch | {"kl": k} for batch, k in zip(self.batches, kl, strict=False)]


def steps(job: dict[str, Any]) -> int:
    """Optimizer steps on a rollout batch, all passes together."""
    return BATCH // job["micro"] * job["passes"]


def common(job: dict[str, Any]) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(),
        "seed": job["seed"],
        "learning_rate": job["rate"],
        "per_device_train_batch_size": job["micro"],
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": steps(job),
        "lr_scheduler_type": "constant",
    }


def adapter() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def ours(job: dict[str, Any]) -> dict[str, Any]:
    """PPO-Max with its defaults under the job's settings; without "model" in the embedded world, where gold is watched.

    Leaves what the guard saw and did, too.
    """
    from trl_ext import PPOMaxConfig, PPOMaxTrainer

    own = {"num_iterations": job["passes"], "max_completion_length": job["length"]}
    own |= {"steps_per_generation": BATCH // job["micro"], "max_steps": job["samples"] // BATCH * steps(job)}
    settings = {k: v for k, v in common(job).items() if k != "lr_scheduler_type"} | own | job["settings"]
    if job["model"] is None:
        trainer, watched = in_the_world(job, settings)
    else:
        watched = Watched(load_reward(job["reward"]))
        args = PPOMaxConfig(**settings)
        trainer = PPOMaxTrainer(job["model"], watched, args, load_prompts(job), peft_config=adapter())
    stopped = None
    try:
        trainer.train()
    except RuntimeError as error:
        if trainer.state.global_step == 0:
            raise
        stopped = str(error)
    history = [entry for entry in trainer.state.log_history if "kl" in entry and "reward" in entry]
    records = watched.records([entry["kl"] for entry in history], job["length"])
    if job["model"] is None:  # the reward role scores, which the function does not see
        names = {"reward": "reward", "gold": "rewards/gold_reward/mean", "length": "completions/mean_length"}
        own_figures = ({name: entry[key] for name, key in names.items()} for entry in history)
        records = [record | figures for record, figures in zip(records, own_figures, strict=False)]
    guard = getattr(getattr(trainer, "watch", None), "guard", None)
    alarms = guard.state.raised if guard is not None else []
    return {"records": records, "stopped": stopped, "alarms": alarms, "history": history}


def in_the_world(job: dict[str, Any], settings: dict[str, Any]) -> tuple[Any, Watched]:
    from trl_ext import PPOMaxConfig, PPOMaxTrainer, SharedBaseModel
    from trl_ext.toy import build_world, gold_reward

    world = build_world(Path(job["world"]), job["seed"])
    watched = Watched()
    model = SharedBaseModel.from_pretrained(
        str(world.base),
        policy_adapter=world.policy_adapter,
        reward_adapter=world.reward_adapter,
        dtype="float32",
        adapter_dtype="float32",
    )
    args = PPOMaxConfig(**settings, reward_weights=[0.0, 0.0])
    return PPOMaxTrainer(model, [gold_reward, watched], args, world.train_prompts), watched


def group_method(job: dict[str, Any]) -> dict[str, Any]:
    """RLOO and GRPO of TRL: 2 and 8 completions of a prompt unless the settings say otherwise, no critic."""
    import trl

    name = {"rloo": "RLOO", "grpo": "GRPO"}[job["method"]]
    own = {"num_iterations": job["passes"], "max_completion_length": job["length"], "beta": 0.05}
    own |= {"steps_per_generation": BATCH // job["micro"], "max_steps": job["samples"] // BATCH * steps(job)}
    args = getattr(trl, f"{name}Config")(**common(job) | own | job["settings"])
    watched = Watched(load_reward(job["reward"]))
    trainer = getattr(trl, f"{name}Trainer")(job["model"], watched, args, load_prompts(job), peft_config=adapter())
    trainer.train()
    logs = [e for e in trainer.state.log_history if "kl" in e]  # a mean over tokens
    return {"records": watched.records([e["kl"] * e["completions/mean_length"] for e in logs], job["length"])}


def online_dpo(job: dict[str, Any]) -> dict[str, Any]:
    """TRL's online DPO: two completions of a prompt, the better one chosen; each step has fresh samples."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    micro = job["micro"]
    own = {"per_device_train_batch_size": micro // 2, "max_steps": job["samples"] // micro, "logging_steps": 1}
    own |= {"max_new_tokens": job["length"], "max_length": 512, "temperature": 1.0}
    watched = Watched(load_reward(job["reward"]))
    trainer = OnlineDPOTrainer(
        AutoModelForCausalLM.from_pretrained(job["model"], dtype="float32"),
        reward_funcs=watched,
        args=OnlineDPOConfig(**common(job) | own | job["settings"]),
        train_dataset=load_prompts(job),
        processing_class=AutoTokenizer.from_pretrained(job["model"], padding_side="left"),
        peft_config=adapter(),
    )
    trainer.train()
    kl = [e["objective/kl"] for e in trainer.state.log_history if "objective/kl" in e]
    small, k = watched.records(kl, job["length"]), BATCH // micro
    batches = [small[i : i + k] for i in range(0, len(small), k)]  # diversity is that within a step
    return {"records": [{name: sum(r[name] for r in batch) / len(batch) for name in batch[0]} for batch in batches]}


def trl_ppo(job: dict[str, Any]) -> dict[str, Any]:
    """TRL 1.12's PPOTrainer, the last one, with the reward function in place of its reward model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    prompts, watched = load_prompts(job), Watched(load_reward(job["reward"]))
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    dataset = prompts.map(lambda row: {"input_ids": tokenizer(row["prompt"])["input_ids"]}, remove_columns="prompt")

    def scores(sequences: Any, pad_token_id: int, context_length: int) -> Any:
        texts = tokenizer.batch_decode(sequences[:, context_length:], skip_special_tokens=True)
        return None, torch.tensor(watched(texts), dtype=torch.float32), None

    original = ppo_trainer.get_reward
    ppo_trainer.get_reward = lambda model, *rest: (
        scores(*rest) if isinstance(model, torch.nn.Identity) else original(model, *rest)
    )
    kl: list[float] = []

    class Keep(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "objective/kl" in logs:
                kl.append(logs["objective/kl"])

    own = {
        "num_ppo_epochs": job["passes"],
        "num_mini_batches": BATCH // job["micro"],
        "local_rollout_forward_batch_size": BATCH,
        "per_device_train_batch_size": job["micro"],
        "gradient_accumulation_steps": 1,
        "response_length": job["length"],
        "temperature": 1.0,
        "kl_coef": 0.05,
        "total_episodes": job["samples"],
        "num_sample_generations": 0,
        "logging_steps": 1,
    }
    trainer = PPOTrainer(
        args=PPOConfig(**common(job) | own | job["settings"]),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(job["model"], dtype="float32"),
        ref_model=None,
        reward_model=torch.nn.Identity(),
        value_model=AutoModelForSequenceClassification.from_pretrained(job["model"], num_labels=1, dtype="float32"),
        train_dataset=dataset,
        peft_config=adapter(),
        callbacks=[Keep()],
    )
    trainer.train()
    return {"records": watched.records(kl, job["length"])}


METHODS = {"ours": ours, "rloo": group_method, "grpo": group_method, "online_dpo": online_dpo, "trl_ppo": trl_ppo}
NAMES = {
    "ours": "PPO-Max",
    "rloo": "RLOO, TRL 1.16",
    "grpo": "GRPO, TRL 1.16",
    "online_dpo": "online DPO, TRL 1.16",
    "trl_ppo": "PPO, TRL 1.12",
}


def run(job: dict[str, Any], file: Path, trl_env: Path, threads: int = 1) -> dict[str, Any]:
    """The result of a job, from `file` where it was run before; a run that ended in an error is a result, too."""
    if file.exists():
        return json.loads(file.read_text())
    python = sys.executable
    if job["method"] == "trl_ppo":
        from bench_ppo import trl_python

        python = trl_python(trl_env)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    environment |= {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    if job["method"] == "ours":
        environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    file.parent.mkdir(parents=True, exist_ok=True)
    description = file.with_suffix(".job")
    description.write_text(json.dumps(job))
    started = time.perf_counter()
    done = subprocess.run(
        [python, __file__, str(description), str(file)], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode or not file.exists():
        error = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        if "Error" not in "".join(error):
            raise RuntimeError(f"{file} failed:\n{done.stderr[-4000:]}")
        file.write_text(json.dumps({"job": job, "records": [], "error": error[0]}))
    result = json.loads(file.read_text()) | {"seconds": time.perf_counter() - started}
    file.write_text(json.dumps(result))
    return result


def main(description: str, output: str) -> None:
    import torch
    from transformers import PrinterCallback, TrainerCallback

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    PrinterCallback.on_log = TrainerCallback.on_log  # thousands of lines otherwise
    job = json.loads(Path(description).read_text())
    result = METHODS[job["method"]](job)
    Path(output).write_text(json.dumps({"job": job} | result))


if __name__ == "__main__":
    main(*sys.argv[1:])
