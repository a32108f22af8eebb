"""The online variants: responses sampled from the current policy, and scored, while it trains.

Source: Yuan et al. 2023, arXiv 2304.05302, which samples every k optimizer steps (OP-k) or before every iteration over
the prompts (IP-n). Both are one thing here: at the set moments the batches up to the next one are drawn from the data
at once, and their responses are replaced by samples. A pass over the prompts always begins with such a moment, also
where k steps are not over.

Deviation: the penalty on the KL to the reference, without which the paper sees the online form exploit its reward, is a
term of the loss (`losses.reference_kl_loss`) and not part of the reward.
"""

import time
from typing import Any

import torch
from transformers import GenerationConfig, TrainerCallback

from trl_ext.generation.vllm import VLLMEngine, row_seeds
from trl_ext.generation.vllm_probe import checked_engine
from trl_ext.generation.vllm_server import SamplingParameters
from trl_ext.roles import Role, SharedBaseModel
from trl_ext.rrhf.config import RRHFConfig
from trl_ext.rrhf.data import RankedRow
from trl_ext.rrhf.metrics import Ratio, mean_of
from trl_ext.scoring import ResponseScorer
from trl_ext.text import TextEncoder, pad_ids, until_end


class OnlineSampler:
    """Replaces the responses of rows by samples of the current policy, and their scores by the scorer's.

    Args:
        model: The policy samples.
        encoder: Of its tokenizer.
        args: `RRHFConfig`.
        scorer: Scores the samples.

    Attributes:
        engine: A vLLM server that samples in place of the model, where `vllm_server_url` says so.
    """

    def __init__(self, model: SharedBaseModel, encoder: TextEncoder, args: RRHFConfig, scorer: ResponseScorer):
        self.model, self.encoder, self.args, self.scorer = model, encoder, args, scorer
        self.parameters = SamplingParameters(
            args.max_completion_length, tuple(encoder.end_ids), args.temperature, args.top_p
        )
        self.engine: VLLMEngine | None = None
        if args.vllm_server_url is not None:
            given = (self.parameters, encoder.tokenizer, str(args.output_dir))
            self.engine = checked_engine(model, args, *given, seed=args.seed)

    def resample(self, rows: list[RankedRow], seed: int) -> tuple[list[RankedRow], dict[str, Ratio]]:
        """New rows for the same prompts, and metrics of the samples. Every process calls where there is an engine.

        Args:
            rows: In any number; they are left as they are.
            seed: Of the samples. Torch's own state of random numbers is left as it was.
        """
        start = time.perf_counter()
        sampled = self._sample([row.prompt_ids for row in rows], seed)
        new = []
        for row, responses in zip(rows, sampled, strict=True):
            if self.args.online_keep_best and row.response_ids:
                best = max(range(len(row.scores)), key=row.scores.__getitem__)
                responses = [*responses, row.response_ids[best]]
            new.append(RankedRow(row.prompt, row.prompt_ids, responses, [], row.columns))
        flat = [(row, ids) for row in new for ids in row.response_ids]
        scores: list[float] = []
        for i in range(0, len(flat), self.args.generation_batch_size):
            scores += self.scorer(flat[i : i + self.args.generation_batch_size])
        numbers = iter(scores)
        for row in new:
            row.scores = [next(numbers) for _ in row.response_ids]
        return new, self._metrics(new, sampled, time.perf_counter() - start)

    @torch.no_grad()
    def _sample(self, prompts: list[list[int]], seed: int) -> list[list[list[int]]]:
        """K responses to each prompt, each up to and with its first eos token."""
        args, model, pad = self.args, self.model, self.encoder.pad_id
        if self.engine is not None:
            self.engine.sync(Role.POLICY)
            seeds = row_seeds(seed, 0, len(prompts))
            found = self.engine.sample(prompts, seeds, self.parameters, args.num_online_responses, Role.POLICY)
            return [[completion.ids for completion in group] for group in found]
        config = GenerationConfig(
            max_new_tokens=args.max_completion_length,
            do_sample=True,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=0,  # the defaults of these would be taken from the base's own generation config
            repetition_penalty=1.0,
            num_return_sequences=args.num_online_responses,
            eos_token_id=self.encoder.end_ids,
            pad_token_id=pad,
        )
        device = model.input_device
        per_call = max(1, args.generation_batch_size // args.num_online_responses)
        responses: list[list[int]] = []
        was_training = model.training
        model.eval()
        with torch.random.fork_rng([device] if device.type == "cuda" else []), model.role(Role.POLICY):
            torch.manual_seed(seed)
            for i in range(0, len(prompts), per_call):
                ids, mask = pad_ids(prompts[i : i + per_call], pad, left=True, device=device)
                output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
                responses += [until_end(row, self.encoder.end_ids) for row in output[:, ids.shape[1] :].tolist()]
        model.train(was_training)
        k = args.num_online_responses
        return [responses[i : i + k] for i in range(0, len(responses), k)]

    def _metrics(self, rows: list[RankedRow], sampled: list[list[list[int]]], seconds: float) -> dict[str, Ratio]:
        k = self.args.num_online_responses
        scores = [row.scores[:k] for row in rows]
        responses = [ids for group in sampled for ids in group]
        ended = [self.encoder.ended(ids) for ids in responses]
        return {
            "reward": mean_of(score for group in scores for score in group),
            "reward_best": mean_of(max(group) for group in scores),
            "reward_spread": mean_of(max(group) - min(group) for group in scores),
            "completions/mean_length": mean_of(len(ids) for ids in responses),
            "completions/truncated_ratio": mean_of(not end for end in ended),
            "completions/empty_ratio": mean_of(len(i) == 1 and end for i, end in zip(responses, ended, strict=True)),
            "completions/duplicate_ratio": mean_of(1 - len(set(map(tuple, group))) / k for group in sampled),
            "seconds/online": (seconds, 1.0),
        }


class BorderCallback(TrainerCallback):
    """Holds checkpoints and evaluations back until the sampled batches are used up.

    A resumed run then samples the same again; and an evaluation comes at the step of its checkpoint, so that the best
    checkpoint is one that exists.

    Args:
        sampled_batches: Batches that have been sampled and not trained on yet; emptied when training begins.
    """

    def __init__(self, sampled_batches: list[dict[str, Any]]):
        self.sampled_batches = sampled_batches
        self.save_waits = self.evaluate_waits = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampled_batches.clear()
        self.save_waits = self.evaluate_waits = False

    def at_border(self, state: Any) -> bool:
        """Whether no sampled batch is left, or training is over."""
        return not self.sampled_batches or state.global_step >= state.max_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.save_waits |= control.should_save
        self.evaluate_waits |= control.should_evaluate
        at_border = self.at_border(state)
        control.should_save, control.should_evaluate = self.save_waits and at_border, self.evaluate_waits and at_border
        if at_border:
            self.save_waits = self.evaluate_waits = False
