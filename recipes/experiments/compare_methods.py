"""The methods of recipes/experiments/compare.py, each run in a process of its own: job.json in, result.json out.

Every method gets the same prompts, reward and number of generated samples, four to a prompt except for PPO-Max, which
takes one; where a method repeats its samples it makes two passes. All start at the same policy, which stays the
reference.
"""

import json
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone need not be installed

from trl_ext.data import load_split
from trl_ext.scripts.inputs import load_reward_function

BATCH, PER_PROMPT, PASSES = 32, 4, 2  # samples in a rollout batch, responses to a prompt, passes over samples
QUIET = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": False}


class RoleReward:
    """The reward role of a shared base as a TRL reward function, for trainers that know no roles."""

    def __init__(self, job: dict[str, Any]):
        self.__name__ = "reward_adapter"
        self.scorer, self.tokenizer = make_scorer(job, load_start(job)), load_tokenizer(job)

    def __call__(self, prompts: list[Any], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        from trl_ext.report.evaluation import AnsweredPrompt

        encode = self.scorer.encoder.prompt_ids
        rows = [AnsweredPrompt(prompt, encode(prompt), {}) for prompt in prompts]
        return self.scorer(list(zip(rows, completion_ids, strict=True)))


# ---------------------------------------------------------------------- what all methods share


def load_tokenizer(job: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(job["base"], padding_side="left")


def load_prompts(job: dict[str, Any]) -> tuple[Any, Any]:
    """Training prompts, as many as the largest method needs, and held-out ones."""
    if job["dataset"] is None:
        from trl_ext.toy import build_world

        world = build_world(job["world"]["folder"], job["world"]["seed"], scale=job["world"]["scale"])
        train, test = world.train_prompts, world.eval_prompts
    else:
        rows = load_split(job["dataset"], "train").select_columns("prompt")
        test = rows.select(range(min(job["eval_prompts"], len(rows) // 2)))
        train = rows.select(range(len(test), len(rows)))
    return train.shuffle(seed=job["seed"]), test.select(range(min(job["eval_prompts"], len(test))))


def load_functions(job: dict[str, Any]) -> list[Any]:
    return [load_reward_function(spec) for spec in job["reward_funcs"]]


def fresh_adapter(job: dict[str, Any]) -> Any:
    """The LoRA configuration of a policy that has no adapter to start from."""
    from trl_ext.roles import lora_config

    return None if job["policy_adapter"] else lora_config(r=job["lora_r"], lora_alpha=job["lora_r"])


def load_start(job: dict[str, Any], with_critic: bool = False) -> Any:
    """Policy, reference and, if the job has one, reward role, before any training."""
    from trl_ext import SharedBaseModel

    return SharedBaseModel.from_pretrained(
        job["base"],
        policy_adapter=job["policy_adapter"],
        reward_adapter=job["reward_adapter"],
        peft_config=fresh_adapter(job),
        dtype=job["dtype"],
        with_critic=with_critic,
    )


def make_scorer(job: dict[str, Any], model: Any) -> Any:
    from trl_ext.rrhf import ResponseScorer

    return ResponseScorer(model if job["reward_adapter"] else None, load_tokenizer(job), load_functions(job))


def trl_model(job: dict[str, Any]) -> tuple[Any, Any]:
    """What TRL's own trainers are given: a model and the configuration of its adapter, or a PEFT model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(job["base"], dtype=job["dtype"])
    if job["policy_adapter"]:
        return PeftModel.from_pretrained(base, job["policy_adapter"], is_trainable=True), None
    return base, fresh_adapter(job)


def arguments(job: dict[str, Any], **own: Any) -> dict[str, Any]:
    """Training arguments: the method's own, over those of all, under what the job sets."""
    common = QUIET | {"output_dir": job["folder"], "seed": job["seed"], "logging_steps": 50, "bf16": False}
    return common | {"use_cpu": job["cpu"]} | own | job["settings"]


# ---------------------------------------------------------------------- the methods


def sample(job: dict[str, Any]) -> None:
    """The samples that RRHF and DPO train on."""
    from trl_ext.rrhf import SamplingConfig, sample_responses

    train, _ = load_prompts(job)
    count = job["samples"] // PER_PROMPT
    model = load_start(job)
    args = SamplingConfig(
        sampling_methods=[f"temperature:{PER_PROMPT}"],
        max_new_tokens=job["max_new_tokens"],
        sampling_batch_size=4 * BATCH,
        sampling_seed=job["seed"],
    )
    prompts = train.select(range(count)).select_columns("prompt")
    sample_responses(model, load_tokenizer(job), prompts, job["responses"], args, make_scorer(job, model))


def train_rrhf(job: dict[str, Any]) -> None:
    from trl_ext import RRHFConfig, RRHFTrainer
    from trl_ext.rrhf import load_responses

    own = {"per_device_train_batch_size": 8, "num_train_epochs": PASSES, "max_length": job["max_length"]}
    args = RRHFConfig(**arguments(job, **own))
    trainer = RRHFTrainer(load_start(job), args, load_responses(job["responses"]), processing_class=load_tokenizer(job))
    trainer.train()
    trainer.save_model(job["adapter"])


def train_rrhf_online(job: dict[str, Any]) -> None:
    """Four steps of two prompts on 32 fresh samples each time; every sample is used once."""
    from trl_ext import RRHFConfig, RRHFTrainer

    own = {
        "per_device_train_batch_size": BATCH // PER_PROMPT // 4,
        "online_every_steps": 4,
        "num_online_responses": PER_PROMPT,
        "max_completion_length": job["max_new_tokens"],
        "max_length": job["max_length"],
        "max_steps": job["samples"] // BATCH * 4,
    }
    args = RRHFConfig(**arguments(job, **own))
    train, _ = load_prompts(job)
    functions = {"reward_funcs": load_functions(job)} if job["reward_funcs"] else {}
    trainer = RRHFTrainer(load_start(job), args, train, processing_class=load_tokenizer(job), **functions)
    trainer.train()
    trainer.save_model(job["adapter"])


def train_dpo(job: dict[str, Any]) -> None:
    """The best and the worst of the four samples are the pair; prompts whose samples score alike have none."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from trl_ext.rrhf import load_responses

    rows = []
    for row in load_responses(job["responses"]):
        ranked = sorted(zip(row["scores"], row["responses"], strict=True))
        if ranked[0][0] < ranked[-1][0]:
            rows.append({"prompt": row["prompt"], "chosen": ranked[-1][1], "rejected": ranked[0][1]})
    own = {"per_device_train_batch_size": 8, "num_train_epochs": PASSES, "max_length": job["max_length"]}
    model, peft_config = trl_model(job)
    dataset, tokenizer = Dataset.from_list(rows), load_tokenizer(job)
    args = DPOConfig(**arguments(job, **own))
    trainer = DPOTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer, peft_config=peft_config)
    trainer.train()
    trainer.save_model(job["adapter"])


def train_rloo(job: dict[str, Any]) -> None:
    from trl import RLOOConfig, RLOOTrainer

    own = {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": BATCH // 8,
        "num_generations": PER_PROMPT,
        "num_iterations": PASSES,
        "max_completion_length": job["max_new_tokens"],
        "max_steps": job["samples"] // BATCH * (BATCH // 8) * PASSES,
    }
    train, _ = load_prompts(job)
    model, peft_config = trl_model(job)
    rewards = load_functions(job) or [RoleReward(job)]
    args, tokenizer = RLOOConfig(**arguments(job, **own)), load_tokenizer(job)
    trainer = RLOOTrainer(model, rewards, args, train, processing_class=tokenizer, peft_config=peft_config)
    trainer.train()
    trainer.save_model(job["adapter"])


def train_ppo_max(job: dict[str, Any]) -> None:
    from trl_ext import PPOMaxConfig, PPOMaxTrainer

    own = {
        "per_device_train_batch_size": 8,
        "steps_per_generation": BATCH // 8,
        "num_iterations": PASSES,
        "max_completion_length": job["max_new_tokens"],
        "max_steps": job["samples"] // BATCH * (BATCH // 8) * PASSES,
    }
    train, _ = load_prompts(job)
    args = PPOMaxConfig(**arguments(job, **own))
    functions = {"reward_funcs": load_functions(job)} if job["reward_funcs"] else {}
    model = load_start(job, with_critic=True)
    trainer = PPOMaxTrainer(model, args=args, train_dataset=train, processing_class=load_tokenizer(job), **functions)
    trainer.train()
    trainer.save_model(job["adapter"])


TRAIN = {
    "sample": sample,
    "rrhf": train_rrhf,
    "rrhf_online": train_rrhf_online,
    "rrhf_online_kl": train_rrhf_online,
    "dpo": train_dpo,
    "rloo": train_rloo,
    "ppo_max": train_ppo_max,
}


# ---------------------------------------------------------------------- one job


def peak_memory() -> float:
    """GiB: of the GPU, where there is one, else of the process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss counts what the parent held when it started this process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def evaluate(job: dict[str, Any], best_of: int) -> dict[str, float]:
    from trl_ext.report.evaluation import evaluate_policy
    from trl_ext.roles import tuned_policy
    from trl_ext.toy import gold_reward

    if job["method"] in TRAIN:
        start, reward = job["policy_adapter"], job["reward_adapter"]
        model = tuned_policy(job["base"], job["adapter"], start, reward, dtype=job["dtype"])
    else:
        model = load_start(job)
    metrics, texts = evaluate_policy(
        model if job["cpu"] else model.to("cuda"),
        load_tokenizer(job),
        load_prompts(job)[1],
        make_scorer(job, model),
        max_new_tokens=job["max_new_tokens"],
        seed=job["eval_seed"],
        gold=gold_reward if job["dataset"] is None else None,
        best_of=best_of,
    )
    Path(job["folder"], "responses.txt").write_text("\n\n".join(texts), encoding="utf-8")
    return metrics


def main(path: str) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    job = json.loads(Path(path).read_text())
    Path(job["folder"]).mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    result: dict[str, Any] = {"method": job["method"], "seed": job["seed"]}
    if job["method"] in TRAIN:
        TRAIN[job["method"]](job)
        result |= {"seconds": time.perf_counter() - start, "memory": peak_memory()}
    if job["method"] != "sample":
        result |= evaluate(job, job["best_of"] if job["method"] == "best_of_n" else 1)
    result = {"seconds": time.perf_counter() - start, "memory": peak_memory()} | result
    Path(job["folder"], "result.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
