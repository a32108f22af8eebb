"""A module that stands for vLLM in this process: its layers are fused as vLLM fuses them, and it samples by plain PEFT.

`installed(monkeypatch, folder)` puts it in vLLM's place. What it samples from is a model of its own of the same
checkpoint, so a base that was cut wrongly out of its fused layers computes something else.
"""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from safetensors.torch import load_file
from torch import nn

from tests.vllm_stand_in import Sampling

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
PADDING = 14  # rows by which an engine's embedding is longer


class Fused(nn.Module):
    """A checkpoint's weights, fused.

    Args:
        weights: By their names in the checkpoint.
        order: How often the parts of a fused layer are turned round, which nothing but their numbers tells.
    """

    def __init__(self, weights: dict[str, torch.Tensor], order: int = 0):
        super().__init__()
        self.packed_modules_mapping = FUSED
        held = dict(weights)
        for whole, parts in FUSED.items():
            for first in [name for name in weights if f".{parts[0]}." in name]:
                rows = [held.pop(first.replace(parts[0], part)) for part in parts]
                held[first.replace(parts[0], whole)] = torch.cat(rows[order:] + rows[:order])
        for name, weight in held.items():
            if "embed_tokens" in name or "lm_head" in name:
                weight = torch.cat([weight, weight.new_zeros(PADDING, weight.shape[1])])
            self.register_parameter(name.replace(".", "/"), nn.Parameter(weight.clone(), requires_grad=False))

    def named_parameters(self, *args, **kwargs):
        for name, weight in super().named_parameters(*args, **kwargs):
            yield name.replace("/", ".").replace("_proj.", "_proj.base_layer."), weight


class SamplingParams:
    """The fields that are given."""

    __struct_fields__ = (
        "n", "seed", "max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "temperature", "top_p",
        "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "skip_special_tokens",
        "logprobs", "detokenize",
    )  # fmt: skip

    def __init__(self, **fields):
        unknown = set(fields) - set(self.__struct_fields__)
        assert not unknown, unknown
        self.fields = fields


class LLM:
    """Of `vllm`; `events` and `awake` (bytes of the cache at each call) tell what was asked of it."""

    def __init__(self, folder: Path, order: int = 0, **options):
        self.options, self.events, self.awake = options, [], []
        self.sampling = Sampling(folder)
        self.model = Fused(load_file(folder / "model.safetensors"), order)
        self.cache = [torch.zeros(4, 8) for _ in range(2)]
        self.llm_engine = SimpleNamespace(
            add_lora=self.add, remove_lora=self.remove, model_config=SimpleNamespace(max_model_len=64)
        )
        self.names: dict[int, str] = {}
        torch.manual_seed(7)  # as vLLM does it

    def apply_model(self, function):
        return [function(self.model)]

    def collective_rpc(self, function):
        return [function(SimpleNamespace(model_runner=SimpleNamespace(kv_caches=self.cache)))]

    def get_tokenizer(self):
        return self.sampling.tokenizer

    def add(self, request) -> bool:
        assert request.lora_int_id not in self.names
        self.sampling.load(request.lora_name, request.lora_path)
        self.names[request.lora_int_id] = request.lora_name
        self.events.append("load")
        return True

    def remove(self, number: int) -> bool:
        self.sampling.unload(self.names.pop(number))
        self.events.append("unload")
        return True

    def generate(self, prompts, parameters, lora_request, use_tqdm):
        self.events.append("generate")
        self.awake.append(sum(tensor.untyped_storage().nbytes() for tensor in self.cache))
        assert all((tensor == 0).all() for tensor in self.cache)
        name, path = (None, None) if lora_request is None else (lora_request.lora_name, lora_request.lora_path)
        outputs = []
        for prompt, each in zip(prompts, parameters, strict=True):
            body = each.fields | {"prompt": prompt["prompt_token_ids"]}
            completions = []
            for index in range(body["n"]):
                ids, logps, reason = self.sampling.answer(name, path, body, index)
                told = [{token: SimpleNamespace(logprob=logp)} for token, logp in zip(ids, logps, strict=True)]
                completions.append(SimpleNamespace(index=index, token_ids=ids, logprobs=told, finish_reason=reason))
            outputs.append(SimpleNamespace(prompt_token_ids=body["prompt"], outputs=completions))
        return outputs


def installed(monkeypatch, folder: Path, order: int = 0) -> list[LLM]:
    """Put it in vLLM's place; the engines that are started are in the list."""
    started: list[LLM] = []

    def start(**options) -> LLM:
        started.append(LLM(folder, order, **options))
        return started[-1]

    vllm, lora, request, operations = (
        ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request", "vllm._custom_ops")
    )
    platform = SimpleNamespace(is_cpu=lambda: True)
    vars(vllm).update(
        LLM=start,
        SamplingParams=SamplingParams,
        __version__="0.32.0",
        platforms=SimpleNamespace(current_platform=platform),
        _custom_ops=operations,
    )
    vars(operations)["_supports_onednn"] = True
    vars(request)["LoRARequest"] = lambda name, number, path: SimpleNamespace(
        lora_name=name, lora_int_id=number, lora_path=path
    )
    for module in (vllm, lora, request, operations):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return started
