"""Text becomes token ids here and nowhere else: prompts, responses, and what a chat template puts behind their end.

Three forms of one response matter, and chat templates make them differ. With ChatML (Qwen2.5) and the answer "Yes":

    sampled, and what a policy is trained on     Yes<|im_end|>          through the token that ends generation
    as a reward model was trained to read it     Yes<|im_end|>\\n        as the template writes a whole conversation
    as a reward function gets it                 Yes

`trl.RewardTrainer` renders whole conversations, so a reward model's head is trained on the hidden state of the
template's last token. A sampled response stops at its end token; `TextEncoder.scored_ids` brings it to that form.
The policy is never trained on what a template puts behind the end token, which it never samples.

Two rules come from transformers and TRL, and adapters that they trained depend on them:
* a classifier reads the last token that is not padding, so where the end token is also padding (a tokenizer without a
  padding token of its own) the score is read on the token before it;
* a plain text gets the tokenizer's end token behind it, a conversation exactly what its template writes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jinja2 import TemplateError
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

Messages: TypeAlias = list[dict[str, Any]]
Prompt: TypeAlias = str | Messages

DEFAULT_MAX_LENGTH = 1024
ANSWER = "zebra"  # a response that no template changes or contains, to see what is written around one
LENGTHS_AT_A_TIME = 512


@dataclass(frozen=True, slots=True)
class _Turn:
    """What a chat template writes around an assistant's last message."""

    # Token ids behind the content, its end token and what follows; None where no token border parts them from it
    ending: list[int] | None
    behind: list[int]  # the part of the ending behind the end token, which a policy never samples
    opening: str  # last word between the assistant's header and the content, as "</think>"; "" for nothing, or blanks
    trims: bool  # whether it takes blanks off the ends of the content
    added: int  # tokens around the content, behind the header; one of them is the end token, if it has one


class TextEncoder:
    """Token ids of prompts and responses.

    Args:
        tokenizer: With an end-of-sequence token, and a chat template where prompts are conversations. Without a padding
            token it gets the end token as one, as in TRL.
        end_ids: Tokens that end a sampled response (`end_token_ids`). Default: the tokenizer's end token.
        chat_template_kwargs: Options of the chat template, as TRL's `chat_template_kwargs`.

    Raises:
        ValueError: The tokenizer has no end token.
    """

    def __init__(
        self,
        tokenizer: Any,
        end_ids: Sequence[int] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ):
        check_tokenizer(tokenizer)
        self.tokenizer = tokenizer
        self.end_ids = list(end_ids or [tokenizer.eos_token_id])
        self.pad_id: int = tokenizer.pad_token_id
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self._turn: _Turn | None = None

    # ------------------------------------------------------------------ prompts

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Tokens of a prompt: with the tokenizer's special tokens, or a conversation up to the assistant's header."""
        text, special = self._prompt_text(prompt)
        return self.tokenizer(text, add_special_tokens=special)["input_ids"]

    def prompt_lengths(self, prompts: Sequence[Prompt], desc: str | None = "measuring prompts") -> list[int]:
        """Number of tokens of every prompt, with a progress bar named `desc` (None: without)."""
        lengths: list[int] = []
        with tqdm(total=len(prompts), desc=desc, unit="prompt", leave=False, disable=desc is None) as bar:
            for start in range(0, len(prompts), LENGTHS_AT_A_TIME):
                part = [self._prompt_text(prompt) for prompt in prompts[start : start + LENGTHS_AT_A_TIME]]
                texts, special = [text for text, _ in part], part[0][1]
                lengths += map(len, self.tokenizer(texts, add_special_tokens=special)["input_ids"])
                bar.update(len(part))
        return lengths

    def _prompt_text(self, prompt: Prompt) -> tuple[str, bool]:
        """What is tokenised, and whether the tokenizer adds special tokens: a chat template writes its own."""
        if isinstance(prompt, str):
            return prompt, True
        return self._render(prompt, add_generation_prompt=True), False

    def _render(self, messages: Messages, **options: Any) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options, **self.chat_template_kwargs)
        except (TemplateError, TypeError, AttributeError, LookupError, ValueError) as error:  # code of others, or none
            what = f"the tokenizer's chat template cannot render {messages!r}: {type(error).__name__}: {error}"
            raise ValueError(f"{what}. Give roles and contents that it knows, or texts for conversations.") from error

    # ------------------------------------------------------------------ responses that somebody wrote

    def response_ids(
        self, prompt: Prompt, response: str | Messages, ended: bool = True, where: str = "a row"
    ) -> list[int]:
        """Tokens of a response as a policy would have sampled it, through its end token.

        They are what follows the prompt's tokens in the tokens of both together; where a token spans their border, the
        response is tokenised alone, as generation would continue. What a template writes between the assistant's header
        and the content, as an empty block of reasoning, the policy has not sampled: it is left out.

        Args:
            prompt: The prompt.
            response: A text, or the messages that follow a conversation.
            ended: False for a response that a length limit cut: it gets no end.
            where: Names the row in errors.

        Raises:
            ValueError: A plain prompt with messages for a response, or a template that does not write a conversation
                behind its prompt.
        """
        text, special = self._prompt_text(prompt)
        if isinstance(prompt, str) and not isinstance(response, str):
            raise ValueError(f"{where}: a plain prompt needs plain responses, got {type(response).__name__}.")
        turn = None if isinstance(prompt, str) else self._turn_of(prompt)
        ending: list[int] | None = None  # where it is not in the text
        if isinstance(prompt, str) or turn is None or not ended:
            whole = text + message_text(response)
            ending = [self.tokenizer.eos_token_id]
        elif turn.opening and turn.ending is not None and len(_as_messages(response)) == 1:
            whole, ending = text + message_text(response), turn.ending
        else:
            whole = self._render([*prompt, *_as_messages(response)])
            if not whole.startswith(text):
                raise ValueError(
                    f"{where}: the chat template renders the conversation as {whole[: len(text) + 20]!r}, which does "
                    f"not begin with its prompt {text!r}. Give prompt and responses as plain strings."
                )
        prompt_ids = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        ids: list[int] = self.tokenizer(whole, add_special_tokens=special)["input_ids"]
        if ids[: len(prompt_ids)] == prompt_ids:
            ids = ids[len(prompt_ids) :]
        else:
            ids = self.tokenizer(whole[len(text) :], add_special_tokens=False)["input_ids"]
        if not ended:
            return ids
        if turn is not None and not turn.added:  # the template writes no end; what is sampled has one
            ending = [self.tokenizer.eos_token_id]
        if ending is not None and ids[-1:] != ending[:1]:
            ids = [*ids, *ending]
        return ids if turn is None else _without(ids, turn.behind)

    def rendered_ids(self, prompt: Prompt, response: str | Messages) -> list[int]:
        """Tokens of prompt and response as `trl.RewardTrainer` makes them; the score is read on `score_length`."""
        if isinstance(prompt, str):
            text, eos = prompt + message_text(response), self.tokenizer.eos_token
            return self.tokenizer(text if text.endswith(eos) else text + eos)["input_ids"]
        whole = self._render([*prompt, *_as_messages(response)])
        return self.tokenizer(whole, add_special_tokens=False)["input_ids"]

    def document_ids(self, row: Mapping[str, Any]) -> list[int]:
        """Tokens of a text to be learnt whole: a row with `text`, or `messages`, or `prompt` and `completion`.

        It ends with its end token, and with nothing behind it.
        """
        prompt: Any
        if "text" in row:
            prompt, response = "", row["text"]
        elif "messages" in row:
            prompt, response = row["messages"][:-1], row["messages"][-1:]
        else:
            prompt, response = row["prompt"], row["completion"]
        if isinstance(prompt, str):
            ids, end = self.tokenizer(prompt + response)["input_ids"], self.tokenizer.eos_token_id
            return ids if ids[-1:] == [end] else [*ids, end]
        ids = self.rendered_ids(prompt, response)
        return _without(ids, self._turn_of(prompt).behind) if prompt else ids

    # ------------------------------------------------------------------ responses that were sampled

    def ended(self, response_ids: Sequence[int]) -> bool:
        """Whether a sampled response stopped at an end token and was not cut by a length limit."""
        return len(response_ids) > 0 and response_ids[-1] in self.end_ids

    def scored_ids(
        self, prompt: Prompt, prompt_ids: Sequence[int], response_ids: Sequence[int], as_sampled: bool = False
    ) -> list[int]:
        """Tokens of a sampled response and its prompt in the form that a reward model was trained on.

        The score is read on the last of them. A response that was cut stays as it is. One that ended gets, in place of
        its end token, what the template writes behind a turn (plain: the tokenizer's end token). Where the template
        writes something before the content that the policy did not, as an empty block of reasoning, or takes off blanks
        that the policy wrote around its answer, the text is rendered anew; `as_sampled` (several turns): it is not.
        """
        ids = [*prompt_ids, *response_ids]
        if self.ended(response_ids):
            if isinstance(prompt, str):
                ids[-1] = self.tokenizer.eos_token_id
            else:
                turn = self._turn_of(prompt)
                written = self.tokenizer.decode(list(response_ids)) if turn.opening else ""
                text = self.response_text(prompt, prompt_ids, response_ids)
                kept = turn.opening in written and not (turn.trims and text != text.strip())
                if turn.ending is not None and (kept or as_sampled):
                    ids[-1:] = turn.ending
                elif not as_sampled:
                    ids = self.rendered_ids(prompt, text)
        return ids[: self.score_length(ids)]

    def added_length(self, prompt: Prompt) -> int:
        """Most tokens by which `scored_ids` is longer than prompt and response, through its end token."""
        return 0 if isinstance(prompt, str) else max(self._turn_of(prompt).added - 1, 0)

    def score_length(self, ids: Sequence[int]) -> int:
        """`score_length` for this tokenizer's padding."""
        return score_length(ids, self.pad_id)

    def response_text(self, prompt: Prompt, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> str:
        """Text that sampled tokens add to their prompt; decoded behind a plain prompt, a leading space stays."""
        alone: str = self.tokenizer.decode(list(response_ids), skip_special_tokens=True)
        if not isinstance(prompt, str):
            return alone
        before: str = self.tokenizer.decode(list(prompt_ids), skip_special_tokens=True)
        together: str = self.tokenizer.decode([*prompt_ids, *response_ids], skip_special_tokens=True)
        return together[len(before) :] if together.startswith(before) else alone

    @staticmethod
    def completion(prompt: Prompt, text: str) -> str | Messages:
        """A response as TRL hands it to reward functions: a text, or a list of one message."""
        return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]

    # ------------------------------------------------------------------ the chat template

    def _turn_of(self, prompt: Messages) -> _Turn:
        """What the template writes around an answer; looked up once, the same for every conversation."""
        if self._turn is None:
            self._turn = self._look_up(prompt)
        return self._turn

    def _look_up(self, prompt: Messages) -> _Turn:
        header, whole = self._prompt_text(prompt)[0], self._render([*prompt, *_as_messages(ANSWER)])
        start = whole.rfind(ANSWER)
        if start < 0:  # the template rewrites what an assistant says
            return _Turn(None, [], "", False, 0)
        opening = whole[len(header) : start].split() if whole.startswith(header) else []
        tokenize = {"add_special_tokens": False}
        tail: list[int] = self.tokenizer(whole[start + len(ANSWER) :], **tokenize)["input_ids"]
        ends = [i for i, token in enumerate(tail) if token in self.end_ids]
        ends = ends or [i for i, token in enumerate(tail) if token in self.tokenizer.all_special_ids]
        before = self.tokenizer(whole[: start + len(ANSWER)], **tokenize)["input_ids"]
        joined = self.tokenizer(whole, **tokenize)["input_ids"] == [*before, *tail]
        bordered = not tail or (bool(ends) and ends[0] == 0)  # an end token never melts into the word before it
        parted = whole.startswith(header) and joined and bordered
        alone = [len(self.tokenizer(part, **tokenize)["input_ids"]) for part in (header, ANSWER)]
        return _Turn(
            ending=tail if parted else None,
            behind=tail[ends[0] + 1 :] if ends else [],
            opening=opening[-1] if opening else "",
            trims=f" {ANSWER}\n" not in self._render([*prompt, *_as_messages(f" {ANSWER}\n")]),
            added=max(len(before) + len(tail) - sum(alone), 0),
        )


def _without(ids: list[int], behind: list[int]) -> list[int]:
    """Token ids without what a template has put behind them."""
    return ids[: -len(behind)] if behind and ids[-len(behind) :] == behind else ids


def score_length(ids: Sequence[int], pad_id: int) -> int:
    """Number of tokens up to and with the last one that is not padding: where a classifier reads its score."""
    length = len(ids)
    while length > 1 and ids[length - 1] == pad_id:
        length -= 1
    return length


def check_tokenizer(tokenizer: Any) -> None:
    """Give a tokenizer without a padding token its end token as one.

    Raises:
        ValueError: No end token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no eos_token, so no response can end. Set it: tokenizer.eos_token = '...', with a token "
            "that your SFT data ends with."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


def load_tokenizer(model_name_or_path: str, **options: Any) -> Any:
    """The tokenizer of a model; options are those of `AutoTokenizer.from_pretrained`, no code of others by default."""
    tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, **{"trust_remote_code": False, **options})
    check_tokenizer(tokenizer)
    return tokenizer


def end_token_ids(tokenizer: Any, generation_config: Any = None) -> list[int]:
    """Tokens that end a sampled response: the tokenizer's end token, and those of the model's generation config."""
    own = getattr(generation_config, "eos_token_id", None)
    own = own if isinstance(own, list | tuple) else [own]
    return sorted({tokenizer.eos_token_id, *own} - {None})


def load_generation_config(model: Any, **options: Any) -> Any:
    """The generation config of a loaded model, or by id with options of `from_pretrained`; None without one."""
    if not isinstance(model, str):
        return getattr(model, "generation_config", None)
    try:
        return GenerationConfig.from_pretrained(model, **options)
    except OSError:  # transformers then makes one from the model's own config, which names end tokens too
        return AutoConfig.from_pretrained(model, **options)


def until_end(ids: list[int], end_ids: Sequence[int]) -> list[int]:
    """Tokens up to and with the first end token; all, if there is none."""
    return next((ids[: i + 1] for i, token in enumerate(ids) if token in end_ids), ids)


def message_text(response: str | Messages) -> str:
    """Words of a response that may be a list of messages."""
    if isinstance(response, str):
        return response
    contents = [message.get("content") or "" for message in response]
    parts = [[content] if isinstance(content, str) else content for content in contents]
    return "".join(part if isinstance(part, str) else str(part.get("text") or "") for each in parts for part in each)


def _as_messages(response: str | Messages) -> Messages:
    return [{"role": "assistant", "content": response}] if isinstance(response, str) else list(response)


def check_prompt(prompt: Any, where: str) -> None:
    """Check that a prompt is a text, or messages with role and content.

    Args:
        prompt: As in the dataset's column `prompt`.
        where: Names the row in errors: "train_dataset row 3".

    Raises:
        ValueError: It is empty, or of another kind.
    """
    drop = "Drop such rows: dataset.filter(lambda row: row['prompt'])."
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError(f"{where} has an empty prompt ({prompt!r}). {drop}")
        return
    if prompt is None or (isinstance(prompt, list | tuple) and not prompt):
        raise ValueError(f"{where} has an empty prompt ({prompt!r}). {drop}")
    if not isinstance(prompt, list | tuple):
        raise ValueError(
            f"{where}: the prompt is {prompt!r}, a {type(prompt).__name__}. Give a text, or a list of messages "
            "{'role': 'user', 'content': '...'}."
        )
    for i, message in enumerate(prompt):
        role = message.get("role") if isinstance(message, Mapping) else None
        content = message.get("content") if isinstance(message, Mapping) else None
        said = isinstance(content, str | list) or (isinstance(message, Mapping) and message.get("tool_calls"))
        if not isinstance(role, str) or not said:
            raise ValueError(
                f"{where}: message {i} of the prompt is {message!r}. Every message needs a role (system, user, "
                "assistant) and a content."
            )
    contents = [message.get("content") for message in prompt]
    if not any(content.strip() if isinstance(content, str) else content for content in contents):
        raise ValueError(f"{where} has an empty prompt ({prompt!r}). {drop}")


def check_prompts(prompts: Sequence[Any], name: str) -> None:
    """`check_prompt` of every row, and that all are of one kind.

    Raises:
        ValueError: What is wrong, with the number of the row.
    """
    first: Any = None
    for row, prompt in enumerate(prompts):
        check_prompt(prompt, f"{name} row {row}")
        first = prompt if row == 0 else first
        if isinstance(prompt, str) != isinstance(first, str):
            raise ValueError(
                f"{name} mixes texts and conversations: row 0 is a {type(first).__name__}, row {row} a "
                f"{type(prompt).__name__}. Make them one kind: a text as [{{'role': 'user', 'content': text}}]."
            )


def longest(max_length: int | None, positions: int | None) -> int:
    """`max_length`, by default 1024 or the model's positions if those are fewer.

    Raises:
        ValueError: More than the model's positions.
    """
    if max_length is None:
        return min(DEFAULT_MAX_LENGTH, positions or DEFAULT_MAX_LENGTH)
    if positions is not None and max_length > positions:
        raise ValueError(f"max_length={max_length} exceeds the model's {positions} positions: lower it to {positions}.")
    return max_length


def pad_ids(
    rows: Sequence[Sequence[int]], pad_token_id: int, *, left: bool, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Token ids and mask, (B, L) int64 each, L the longest row and at least 1.

    The mask comes from lengths, never from token ids, so that an end token that is also padding counts.
    """
    width = max(1, *(len(row) for row in rows))
    ids = torch.full((len(rows), width), pad_token_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, columns] = torch.as_tensor(row, dtype=torch.long)
        mask[i, columns] = 1
    return ids.to(device), mask.to(device)
