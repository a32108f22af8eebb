"""A run with one copy of the base for trainer and engine, in the environment that has both; prints what it found.

PYTHONPATH=. python tests/generation/one_copy_run.py FOLDER float32|4bit
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from tests.generation.widened import wide_base
from tests.ppo import tiny
from trl_ext import PPOMaxTrainer, Role
from trl_ext.generation.vllm_probe import check_server, difference, our_logps, random_adapter, random_prompts
from trl_ext.generation.vllm_server import Prompt, SamplingParameters

MEAN, LARGEST = (f"sampling/sampling_logp_difference/{name}" for name in ("mean", "max"))


def main(folder: Path, kind: str) -> dict[str, Any]:
    more: dict[str, Any] = {}
    dtype = torch.bfloat16 if kind == "4bit" else torch.float32
    if kind == "4bit":
        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        more["quantization_config"] = BitsAndBytesConfig(**settings, bnb_4bit_compute_dtype=dtype)
    base = wide_base(folder / "base", dtype)
    args = tiny.config(
        folder / "run",
        max_steps=3,
        max_completion_length=24,
        vllm_one_copy=True,
        vllm_kv_cache_gib=0.25,
        vllm_max_logp_difference=0.1,
    )
    trainer = PPOMaxTrainer(
        model=str(base),
        reward_funcs=tiny.count_words,
        args=args,
        train_dataset=tiny.prompts(32),
        peft_config=tiny.lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}),
        **more,
    )
    model, engine = trainer.model, trainer.vllm_generation.engine
    held = {p.untyped_storage().data_ptr() for p in engine.server.model.parameters()}
    weights = {name: p for name, p in model.named_parameters() if model.owner(name) is None}
    before = {name: p.clone() for name, p in weights.items()}
    found = {"shared": all(p.untyped_storage().data_ptr() in held for p in weights.values()), "weights": len(weights)}
    model.eval()
    parameters = SamplingParameters(12, (1,), temperature=0.8)
    prompts = random_prompts(trainer.processing_class, 5, engine.max_model_len - 12)
    asked = [Prompt(tuple(ids), 1, i) for i, ids in enumerate(prompts)]
    completions = [each[0] for each in engine.server.complete(engine.base, asked, parameters)]
    rows = [(ids, each.ids) for ids, each in zip(prompts, completions, strict=True)]
    found["base"] = difference([each.logps for each in completions], our_logps(model, rows, 0.8, bare=True))
    versions = []
    for version in range(3):
        with random_adapter(model, version, 0.3):
            engine.sync(Role.POLICY)
            completions = [
                each[0] for each in engine.sample(prompts, range(len(prompts)), parameters, role=Role.POLICY)
            ]
            rows = [(ids, each.ids) for ids, each in zip(prompts, completions, strict=True)]
            theirs, ours = [each.logps for each in completions], our_logps(model, rows, 0.8)
            moved = difference(ours, our_logps(model, rows, 0.8, bare=True))
            versions.append({"difference": difference(theirs, ours), "moved": moved})
    found |= {"versions": versions, "probe": check_server(engine, parameters, trainer.processing_class)}
    model.train()
    policy = tiny.role_weights(model, Role.POLICY)
    trainer.train()
    entries = tiny.rollout_entries(trainer)
    found |= {
        "policy moved": not tiny.same(tiny.role_weights(model, Role.POLICY), policy),
        "base as it was": all(torch.equal(weights[name], value) for name, value in before.items()),
        "rollouts": len(entries),
        "mean": max(entry[MEAN] for entry in entries),
        "largest": max(entry[LARGEST] for entry in entries),
        "cache, bytes": sum(tensor.untyped_storage().nbytes() for tensor in engine.server.cache),
        "adapters": len(engine.server.models()) - 1,
    }
    engine.close()
    return found | {"adapters after": len(engine.server.models()) - 1}


if __name__ == "__main__":
    print("FOUND " + json.dumps(main(Path(sys.argv[1]), sys.argv[2])))
