"""Responses of the policy by `generate`, where the token of every response is chosen from numbers of its prompt's own.

Temperature, nucleus and diverse sampling share one rule, inside a logits processor, so that a response depends on its
prompt and its seed and not on what else is in the batch:

    1. diversity (`diversity_penalty` > 0): logp -= penalty * how many earlier responses to the prompt chose this token
       at this position. This is diverse beam search with groups of one beam, sampled; group beam search itself has
       left transformers for a repository of remote code, and is not used.
    2. softmax(logp / temperature), cut to the smallest set of tokens with mass `top_p`.
    3. the token where the cumulated probability first exceeds the response's next uniform number.

Sources: Vijayakumar et al. 2016, arXiv 1610.02424 (Hamming diversity); Holtzman et al. 2019, arXiv 1904.09751
(nucleus).
Beam search is transformers' own, and draws nothing.
"""

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from trl_ext.generation.vllm import VLLMEngine
from trl_ext.generation.vllm_server import SamplingParameters
from trl_ext.roles import Role, SharedBaseModel
from trl_ext.text import pad_ids, until_end

LARGEST = 1 - 2**-20  # a uniform number below it stays below the whole mass when it is rounded to float32


class SeededChoice(LogitsProcessor):
    """Chooses every next token and leaves no other: greedy decoding then takes it.

    Args:
        uniforms: One number in [0, 1) for each token to come, (B, K, T): B prompts, K responses to each.
        eos_token_ids: What ends a response; one that has ended no longer counts for the others' diversity.
        temperature, top_p, diversity_penalty: See the top of this file.
    """

    def __init__(
        self,
        uniforms: Tensor,
        eos_token_ids: list[int],
        temperature: float = 1.0,
        top_p: float = 1.0,
        diversity_penalty: float = 0.0,
    ):
        self.uniforms, self.step = uniforms, 0
        self.ends = torch.tensor(eos_token_ids, device=uniforms.device)
        self.ended = torch.zeros(uniforms.shape[:2], dtype=torch.bool, device=uniforms.device)
        self.temperature, self.top_p, self.diversity_penalty = temperature, top_p, diversity_penalty

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B * K, L), (B * K, V) -> (B * K, V), 0 for the chosen token and -inf elsewhere."""
        b, k, _ = self.uniforms.shape
        logps = scores.float().log_softmax(-1).view(b, k, -1)
        uniforms = self.uniforms[:, :, self.step]
        if self.diversity_penalty > 0:
            counts, columns = torch.zeros_like(logps[:, 0]), []
            for i in range(k):
                columns.append(self._choose(logps[:, i] - self.diversity_penalty * counts, uniforms[:, i]))
                counts.scatter_add_(1, columns[-1][:, None], (~self.ended[:, i, None]).float())
            chosen = torch.stack(columns, 1)
        else:
            chosen = self._choose(logps.flatten(0, 1), uniforms.flatten()).view(b, k)
        self.ended |= torch.isin(chosen, self.ends)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen.view(-1, 1), 0.0)

    def _choose(self, logps: Tensor, uniforms: Tensor) -> Tensor:
        """(N, V), (N,) -> (N,)."""
        p = (logps / self.temperature).softmax(-1)
        order: Tensor | None = None
        if self.top_p < 1:
            p, order = torch.sort(p, dim=-1, descending=True, stable=True)
            p = torch.where(p.cumsum(-1) - p < self.top_p, p, 0)
        mass = p.cumsum(-1)
        place = torch.searchsorted(mass, (uniforms.clamp(max=LARGEST) * mass[:, -1])[:, None], right=True)
        place = place.clamp(max=p.shape[1] - 1)
        return (place if order is None else order.gather(1, place))[:, 0]


@torch.no_grad()
def generate_responses(
    model: SharedBaseModel,
    prompts: list[list[int]],
    generators: list[torch.Generator],
    count: int,
    max_new_tokens: int,
    *,
    eos_token_ids: list[int],
    pad_token_id: int,
    method: str = "temperature",
    temperature: float = 1.0,
    top_p: float = 1.0,
    diversity_penalty: float = 0.0,
    role: Role = Role.POLICY,
    engine: VLLMEngine | None = None,
) -> list[list[list[int]]]:
    """`count` responses to each prompt, each up to and with its first end token.

    Args:
        model: Its `role`, policy or reference, generates, in evaluation mode.
        prompts: Token ids, any lengths.
        generators: One for each prompt, on the CPU; each gives `count * max_new_tokens` numbers, none for "beam".
        method: "beam": the `count` best of as many beams. Any other: tokens drawn by `SeededChoice`.
        engine: A vLLM server that samples in place of the model, with numbers of its own from one that each generator
            gives. Every process must call.

    Raises:
        ValueError: Beams or a diversity penalty, which no server is asked for.
    """
    if engine is not None:
        if method == "beam" or diversity_penalty > 0:
            raise ValueError(
                f"method={method!r} with diversity_penalty={diversity_penalty:g} cannot be sampled through "
                "vllm_server_url: leave that out, or use temperature and nucleus."
            )
        seeds = [int(torch.randint(2**62, (), generator=generator)) for generator in generators]
        parameters = SamplingParameters(max_new_tokens, tuple(eos_token_ids), temperature, top_p)
        engine.sync(role)
        found = engine.sample(prompts, seeds, parameters, count, role)
        return [[completion.ids for completion in group] for group in found]
    device, was_training = model.input_device, model.training
    beam = method == "beam"
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=count if beam else 1,
        num_return_sequences=count if beam else 1,
        top_k=50,  # unused without sampling; what is not named would be taken from the base's own configuration
        top_p=1.0,
        temperature=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=eos_token_ids,
        pad_token_id=pad_token_id,
    )
    ids, mask = pad_ids(prompts, pad_token_id, left=True, device=device)
    processors = []
    if not beam:
        uniforms = torch.stack([torch.rand(count, max_new_tokens, generator=generator) for generator in generators])
        choice = SeededChoice(uniforms.to(device), eos_token_ids, temperature, top_p, diversity_penalty)
        processors = [choice]
        ids, mask = ids.repeat_interleave(count, 0), mask.repeat_interleave(count, 0)
    model.eval()
    with model.role(role):
        inputs = {"input_ids": ids, "attention_mask": mask}
        output = model.generate(**inputs, generation_config=config, logits_processor=processors)
    model.train(was_training)
    responses = [until_end(row, eos_token_ids) for row in output[:, ids.shape[1] :].tolist()]
    return [responses[i : i + count] for i in range(0, len(responses), count)]


def prompt_generator(seed: int, index: int) -> torch.Generator:
    """Random numbers that belong to one prompt of a dataset, whatever is sampled before it."""
    return torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
