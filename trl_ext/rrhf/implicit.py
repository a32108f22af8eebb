"""A policy as a reward model."""

import logging
import math
from typing import Any

import torch
from torch import Tensor

from trl_ext.data import RowError, check_preference_row
from trl_ext.roles import Role, SharedBaseModel, can_share_prompts, column_limit, max_positions
from trl_ext.rrhf.data import RankedRow, to_batch
from trl_ext.rrhf.losses import sequence_scores
from trl_ext.text import TextEncoder, check_prompt, end_token_ids, longest

LOGGER = logging.getLogger(__name__)


class ImplicitReward:
    """Scores a response by how likely the policy finds it; a TRL reward function.

        without beta: sum_t logp_t / length ** length_penalty
        with beta:    beta sum_t (logp_t - reference_logp_t) / length ** length_penalty

    Sources: Yuan et al. 2023, arXiv 2304.05302 (an RRHF policy as reward model); Rafailov et al. 2023,
    arXiv 2305.18290, equation 5 (the implicit reward of DPO, up to a term of the prompt alone).

    Args:
        model: The policy; with `beta` the reference counts too. `roles.tuned_policy` loads both after a training.
        tokenizer: Has an eos token, and a chat template where prompts are conversations; or a `TextEncoder` of it.
        beta: None scores by the policy alone.
        length_penalty: Default: 1 without beta, as RRHF ranks; 0 with it, as DPO does.
        batch_size: Responses in one pass.
        max_length: Tokens of prompt and response. Default: 1024, or the model's positions.
        name: What trainers call it in their logs.

    Attributes:
        responses_cut: How many responses were longer than `max_length` and have been cut.

    Raises:
        ValueError: A beta that is 0 or not finite, or a negative length penalty.
    """

    def __init__(
        self,
        model: SharedBaseModel,
        tokenizer: Any,
        *,
        beta: float | None = None,
        length_penalty: float | None = None,
        batch_size: int = 16,
        max_length: int | None = None,
        name: str = "implicit_reward",
    ):
        if beta is not None and (not math.isfinite(beta) or beta == 0):
            raise ValueError(f"beta={beta!r} must be a number other than 0, or None to score by the policy alone.")
        if length_penalty is None:
            length_penalty = 1.0 if beta is None else 0.0
        if not (math.isfinite(length_penalty) and length_penalty >= 0):
            raise ValueError(f"length_penalty={length_penalty!r} must be a number of at least 0.")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} must be at least 1.")
        self.__name__ = name
        self.model = model
        if not isinstance(tokenizer, TextEncoder):
            tokenizer = TextEncoder(tokenizer, end_token_ids(tokenizer, model.generation_config))
        self.encoder = tokenizer
        self.beta, self.length_penalty, self.batch_size = beta, length_penalty, batch_size
        self.max_length = longest(max_length, max_positions(model.config))
        self.share = can_share_prompts(model.backbone)
        self.max_columns = column_limit(model.backbone)
        self.responses_cut = 0

    def __call__(self, prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
        """One number for each completion; plain and conversational. See `score`; `kwargs` are not used."""
        return self.score(prompts, completions).tolist()

    @torch.no_grad()
    def score(self, prompts: list[Any], completions: list[Any]) -> Tensor:
        """Scores of N responses, which count as finished: the end token is part of each.

        Args:
            prompts: N prompts, texts or conversations; a prompt that stands several times in a row is computed once.
            completions: N responses, texts or lists of messages.

        Returns:
            (N,) float32 on the CPU.

        Raises:
            ValueError: Lists of other lengths, or a prompt that leaves no room for a response.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts and {len(completions)} completions: give one prompt for each.")
        cut = self.responses_cut
        was_training = self.model.training
        self.model.eval()
        scores = []
        for i in range(0, len(prompts), self.batch_size):
            part = slice(i, i + self.batch_size)
            scores.append(self._score_rows(self._rows(prompts[part], completions[part], i)))
        self.model.train(was_training)
        if self.responses_cut > cut and cut == 0:
            LOGGER.warning(
                f"{self.responses_cut} response(s) longer than max_length={self.max_length} were cut before they were "
                "scored; later ones are counted in responses_cut."
            )
        return torch.cat(scores) if scores else torch.zeros(0)

    def score_pairs(self, dataset: Any) -> tuple[Tensor, Tensor]:
        """Scores of the chosen and of the rejected response of N preferences, for `reward.metrics.evaluate_pairs`.

        Args:
            dataset: Rows in TRL's preference format, plain or conversational; a prompt may be part of both responses.

        Returns:
            (N,), (N,), float32 on the CPU.

        Raises:
            ValueError: A row that is no preference, with its number.
        """
        prompts, completions = [], []
        for index, row in enumerate(dataset):
            try:
                record = check_preference_row(row)
            except RowError as error:
                raise ValueError(f"row {index}: {error}. Drop such rows: trl_ext.data.load_preferences.") from error
            prompts += [record["prompt"]] * 2
            completions += [record["chosen"], record["rejected"]]
        chosen, rejected = self.score(prompts, completions).view(-1, 2).T
        return chosen, rejected

    def _rows(self, prompts: list[Any], completions: list[Any], first: int) -> list[RankedRow]:
        """Neighbours with the same prompt share a row."""
        rows: list[RankedRow] = []
        for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True), start=first):
            if not rows or rows[-1].prompt != prompt:
                check_prompt(prompt, f"prompt {number}")
                prompt_ids = self.encoder.prompt_ids(prompt)
                room = self.max_length - len(prompt_ids)
                if room < 1 or not prompt_ids:
                    raise ValueError(
                        f"prompt {number} has {len(prompt_ids)} tokens, max_length is {self.max_length}: a prompt "
                        "needs at least one and must leave one for the response."
                    )
                rows.append(RankedRow(prompt, prompt_ids, [], []))
            ids = self.encoder.response_ids(prompt, completion, where=f"prompt {number}")
            self.responses_cut += len(ids) > room
            rows[-1].response_ids.append(ids[:room])
            rows[-1].scores.append(0.0)
        return rows

    def _score_rows(self, rows: list[RankedRow]) -> Tensor:
        layout: dict[str, Any] = {"share": self.share, "max_columns": self.max_columns}
        batch = to_batch(rows, self.encoder.pad_id, device=self.model.input_device, **layout)
        roles = (Role.POLICY,) if self.beta is None else (Role.POLICY, Role.REFERENCE)
        outputs = self.model(parts=batch.parts, roles=roles)
        logps, factor = outputs["logps"], 1.0
        if self.beta is not None:
            logps, factor = logps - outputs["reference_logps"], self.beta
        return factor * sequence_scores(logps, outputs["mask"], self.length_penalty).float().cpu()
