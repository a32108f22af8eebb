"""Forward passes by role: log-probabilities, values, scores. Nothing here knows which adapter is where."""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from trl_ext.ops.logprobs import token_logprobs
from trl_ext.ops.packing import PackedBatch, by_sequence, in_order
from trl_ext.roles.adapters import RewardScale
from trl_ext.roles.packed import packed_hidden_states
from trl_ext.roles.role import Role, RoleSwitch


def positions_from_mask(attention_mask: torch.Tensor) -> torch.Tensor:
    """(B, L) mask -> (B, L) positions that start at 0 on each row's first real token, whatever the padding side."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def head_scaling(config: Any) -> tuple[float, float | None]:
    """How the architecture changes `hidden @ W.T` into logits: (factor, soft cap or None).

    Cohere, Falcon-H1 and their kin multiply (`logit_scale`, `lm_head_multiplier`), Granite and MiniCPM3 divide
    (`logits_scaling`), Gemma 2 squashes: `cap * tanh(logits / cap)` (`final_logit_softcapping`).
    """
    text_config = config.get_text_config()
    factor = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        factor *= getattr(text_config, name, None) or 1.0
    factor /= getattr(text_config, "logits_scaling", None) or 1.0
    return factor, getattr(text_config, "final_logit_softcapping", None)


class RolePasses:
    """What a model with roles can compute. Mixed into `SharedBaseModel`, whose switch it uses."""

    if TYPE_CHECKING:
        heads: torch.nn.ModuleDict

        reward_scales: dict[str, RewardScale]

        def role(self, role: Role) -> RoleSwitch: ...
        def reward_adapters(self) -> list[str]: ...
        def _activate(self, role: Role, name: str | None = None) -> None: ...
        def get_base_model(self) -> Any: ...

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, *, roles: Any = None, parts: Any = None, **kwargs: Any
    ) -> Any:
        """As a plain `PeftModel` without `parts`; else the passes of the roles over them, in this single call.

        A single call matters under DistributedDataParallel: a second forward outside the wrapped one breaks its
        bookkeeping of which gradients are ready.

        Args:
            input_ids, attention_mask: As in `PeftModelForCausalLM`, when `parts` is None.
            parts: N responses to prompts, from `ops.packing.pack`.
            roles: Subset of (Role.POLICY, Role.REFERENCE, Role.CRITIC).
            kwargs: With `parts`: `temperature`; `entropy` ("values" or "gradient", with which it can be trained);
                `shape` (N, T) of the results (default: the number of responses and the longest); and `ptx` (a batch
                with `input_ids` and `attention_mask` for the language-model loss).

        Returns:
            `dict` with the `mask` of the response tokens, (N, T), each response from column 0 on; and as asked, (N, T)
            each and zero elsewhere: `logps` of the policy, its `entropy`, `reference_logps`, the critic's `values` of
            the state before each token; `ptx_loss`, a scalar.
        """
        if (parts is None) != (roles is None):
            raise ValueError(f"roles={roles}, parts={parts}: the passes of roles need both, a plain one neither.")
        if parts is None:
            return super().forward(input_ids, attention_mask, **kwargs)  # type: ignore[misc]
        return self._forward_packed(parts, tuple(map(Role, roles)), **kwargs)

    def _forward_packed(
        self,
        parts: list[PackedBatch],
        roles: tuple[Role, ...],
        *,
        temperature: float = 1.0,
        entropy: str | None = None,
        shape: tuple[int, int] | None = None,
        ptx: dict[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        if Role.REWARD in roles or entropy not in (None, "values", "gradient"):
            raise ValueError(
                f"roles={roles}, entropy={entropy!r}: use `score_parts` for the reward role; entropy is None, 'values' "
                "or 'gradient'."
            )
        outputs: dict[str, torch.Tensor] = {}
        backbone = self.get_base_model().base_model
        names = {Role.POLICY: "logps", Role.REFERENCE: "reference_logps", Role.CRITIC: "values"}
        for role in roles:
            per_token, entropies = [], []
            wanted = entropy if role is Role.POLICY else None
            with self.role(role), torch.set_grad_enabled(torch.is_grad_enabled() and role is not Role.REFERENCE):
                for part in parts:
                    hidden = packed_hidden_states(backbone, part).index_select(0, part.sources)
                    if role is Role.CRITIC:
                        per_token.append(self.heads["critic"](hidden))
                        continue
                    logps, nats = self._logprobs(
                        hidden, part.targets, temperature, wanted is not None, wanted == "gradient"
                    )
                    per_token.append(logps)
                    entropies.append(nats)
            outputs[names[role]], outputs["mask"] = by_sequence(parts, per_token, shape)
            if wanted is not None:
                outputs["entropy"], _ = by_sequence(parts, entropies, shape)
        if ptx is not None:
            with self.role(Role.POLICY):
                hidden = self.hidden_states(ptx["input_ids"], ptx["attention_mask"])[:, :-1]
            mask = ptx["attention_mask"][:, 1:].bool() & ptx["attention_mask"][:, :-1].bool()
            logps, _ = self._logprobs(hidden[mask], ptx["input_ids"][:, 1:][mask], 1.0, False, False)
            outputs["ptx_loss"] = -logps.mean()
        return outputs

    def hidden_states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(B, L), (B, L) -> (B, L, H): last hidden states of the base under the active role, no LM head.

        Positions follow the mask, so that padding on the left does not shift learned position embeddings.
        """
        backbone = self.get_base_model().base_model
        kwargs: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": False}
        if "position_ids" in inspect.signature(backbone.forward).parameters:
            kwargs["position_ids"] = positions_from_mask(attention_mask)
        return backbone(input_ids=input_ids, **kwargs).last_hidden_state

    def _logprobs(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        with_entropy: bool,
        entropy_grad: bool,
    ) -> tuple[torch.Tensor, Any]:
        base = self.get_base_model()
        lm_head = base.get_output_embeddings()
        factor, softcap = head_scaling(base.config)
        return token_logprobs(
            hidden.to(lm_head.weight.device),
            lm_head.weight,
            targets.to(lm_head.weight.device),
            bias=getattr(lm_head, "bias", None),
            temperature=temperature,
            softcap=softcap,
            logit_scale=factor,
            with_entropy=with_entropy,
            entropy_grad=entropy_grad,
        )

    @torch.no_grad()
    def score(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The reward role's score of each sequence: the mean over its adapters, which is one unless it is an ensemble.

        See `score_members` for arguments and errors.

        Returns:
            (B,) float32.
        """
        return self.score_members(input_ids, attention_mask).mean(-1)

    @torch.no_grad()
    def score_members(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The score of each sequence by each reward adapter: its head on the last real token.

        An adapter that was saved with the mean and standard deviation of its scores on reference responses has them
        taken off: (s - mean) / std.

        Args:
            input_ids: (B, T), padded on either side.
            attention_mask: (B, T), at least one 1 a row.

        Returns:
            (B, K) float32, K reward adapters.

        Raises:
            ValueError: No reward role, shapes that differ, or a row without a token.
        """
        _check_batch(input_ids, attention_mask)
        columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        last = (attention_mask * columns).argmax(-1)
        rows = torch.arange(len(last), device=last.device)
        return self._members(lambda: self.hidden_states(input_ids, attention_mask)[rows, last])

    @torch.no_grad()
    def score_parts(self, parts: list[PackedBatch]) -> torch.Tensor:
        """`score_members` of sequences laid out by `ops.packing.pack`, (N, K)."""
        backbone = self.get_base_model().base_model

        def last_states() -> torch.Tensor:
            states = (packed_hidden_states(backbone, part).index_select(0, part.ends) for part in parts)
            return in_order(parts, list(states))

        return self._members(last_states)

    def _members(self, last_states: Callable[[], torch.Tensor]) -> torch.Tensor:
        scores = []
        with self.role(Role.REWARD):
            for name in self.reward_adapters():
                self._activate(Role.REWARD, name)
                score = self.heads[name](last_states())
                scale = self.reward_scales.get(name)
                scores.append(score if scale is None else (score - scale.mean) / scale.std)
        return torch.stack(scores, dim=-1)

    @torch.no_grad()
    def values(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The critic's value after each token, (B, T), (B, T) -> (B, T) float32; meaningless where the mask is 0.

        Raises:
            ValueError: Shapes that differ, or a row without a token.
        """
        _check_batch(input_ids, attention_mask)
        with self.role(Role.CRITIC):
            return self.heads["critic"](self.hidden_states(input_ids, attention_mask))


def _check_batch(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> None:
    if input_ids.ndim != 2 or input_ids.shape != attention_mask.shape:
        raise ValueError(
            f"input_ids {tuple(input_ids.shape)} and attention_mask {tuple(attention_mask.shape)} must both be (B, T)."
        )
    empty = (attention_mask.sum(-1) == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"rows {empty} of attention_mask have no 1: there is no token to score.")
