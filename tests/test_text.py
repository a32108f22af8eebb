"""Text to token ids, on every chat template that TRL ships and on plain texts."""

import pytest
from datasets import Dataset
from trl import RewardConfig, RewardTrainer

from tests import chat
from tests.ppo.tiny import tiny_tokenizer
from trl_ext.text import (
    TextEncoder,
    check_prompt,
    check_prompts,
    end_token_ids,
    longest,
    message_text,
    pad_ids,
    until_end,
)

USER = [{"role": "user", "content": "Hi there"}]
# Their templates open the answer with a block of reasoning that the assistant's header does not write alike
NOT_BEHIND_ITS_PROMPT = ("deepseek", "nemotron")


def sampled(encoder: TextEncoder, text: str) -> list[int]:
    """A response as generation returns it."""
    return [*encoder.tokenizer(text, add_special_tokens=False)["input_ids"], encoder.end_ids[0]]


def trl_ids(tokenizer, rows: list[dict]) -> list[list[int]]:
    """Tokens of `chosen` as RewardTrainer's own preparation makes them."""
    trainer = RewardTrainer.__new__(RewardTrainer)
    dataset = Dataset.from_list([row | {"rejected": row["chosen"]} for row in rows])
    args = RewardConfig("unused", use_cpu=True, bf16=False, max_length=None)
    return list(trainer._prepare_dataset(dataset, tokenizer, args, "train")["chosen_ids"])


def read_by_a_classifier(ids: list[int], pad: int) -> list[int]:
    """transformers' rule: up to the rightmost token that is not padding."""
    return ids[: max(i for i, token in enumerate(ids) if token != pad) + 1]


@pytest.mark.parametrize("pad", ["<pad>", None], ids=["own pad", "pad is eos"])
@pytest.mark.parametrize("name", chat.shipped())
def test_a_score_is_read_on_the_ids_of_reward_trainer(name, pad):
    tokenizer = chat.shipped_tokenizer(name, pad_token=pad)
    encoder = TextEncoder(tokenizer)
    answer = [{"role": "assistant", "content": "Yes"}]
    wanted = trl_ids(tokenizer, [{"prompt": USER, "chosen": answer}])[0]
    assert encoder.rendered_ids(USER, "Yes") == encoder.rendered_ids(USER, answer) == wanted  # training
    read = read_by_a_classifier(wanted, tokenizer.pad_token_id)
    assert encoder.score_length(wanted) == len(read)
    prompt_ids = encoder.prompt_ids(USER)
    assert encoder.scored_ids(USER, prompt_ids, sampled(encoder, "Yes")) == read  # PPO, RRHF online
    if not name.startswith(NOT_BEHIND_ITS_PROMPT):
        response = encoder.response_ids(USER, "Yes")
        if encoder.ended(response):
            assert encoder.scored_ids(USER, prompt_ids, response) == read  # responses of a dataset, ranked


@pytest.mark.parametrize("name", chat.shipped())
def test_a_prompt_is_tokenised_as_rloo_does(name):
    tokenizer = chat.shipped_tokenizer(name)
    own = tokenizer.apply_chat_template([USER], add_generation_prompt=True, tokenize=True, return_dict=True)
    encoder = TextEncoder(tokenizer)
    assert [encoder.prompt_ids(USER)] == own["input_ids"]
    assert encoder.prompt_lengths([USER, USER], None) == [len(own["input_ids"][0])] * 2


def test_the_policy_is_not_trained_on_what_stands_behind_the_end_token():
    encoder = TextEncoder(chat.tokenizer_of(chat.CHATML, "<|im_end|>"))
    response = encoder.response_ids(USER, "Yes")
    assert encoder.tokenizer.decode(response) == "Yes<|im_end|>"
    whole = encoder.tokenizer.decode(encoder.scored_ids(USER, encoder.prompt_ids(USER), response))
    assert whole == "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
    assert encoder.added_length(USER) == 1
    messages = [*USER, {"role": "assistant", "content": "Yes"}]
    assert encoder.tokenizer.decode(encoder.document_ids({"messages": messages})).endswith("Yes<|im_end|>")
    row = {"prompt": USER, "completion": messages[1:]}
    assert encoder.document_ids(row) == encoder.document_ids({"messages": messages})


def test_a_response_that_was_cut_gets_no_end():
    encoder = TextEncoder(chat.tokenizer_of(chat.CHATML, "<|im_end|>"))
    prompt_ids, cut = encoder.prompt_ids(USER), sampled(encoder, "Yes")[:-1]
    assert encoder.scored_ids(USER, prompt_ids, cut) == [*prompt_ids, *cut]
    assert encoder.response_ids(USER, "Yes", ended=False) == cut
    assert not encoder.ended(cut)
    assert not encoder.ended([])


def test_another_end_token_is_read_as_the_one_that_the_template_writes():
    tokenizer = chat.tokenizer_of(chat.CHATML, "<|im_end|>")
    other = tokenizer.convert_tokens_to_ids("<bos>")
    encoder = TextEncoder(tokenizer, [tokenizer.eos_token_id, other])
    prompt_ids, words = encoder.prompt_ids(USER), sampled(encoder, "Yes")[:-1]
    expected = encoder.scored_ids(USER, prompt_ids, [*words, tokenizer.eos_token_id])
    assert encoder.scored_ids(USER, prompt_ids, [*words, other]) == expected
    plain = encoder.prompt_ids("Hi")
    assert encoder.scored_ids("Hi", plain, [*words, other]) == [*plain, *words, tokenizer.eos_token_id]


def test_reasoning_that_the_policy_wrote_stays_and_a_missing_block_is_rendered():
    encoder = TextEncoder(chat.shipped_tokenizer("qwen3"))
    prompt_ids = encoder.prompt_ids(USER)
    thought = sampled(encoder, "<think>\nhm\n</think>\n\nYes")
    assert encoder.tokenizer.decode(encoder.scored_ids(USER, prompt_ids, thought)[len(prompt_ids) :]) == (
        "<think>\nhm\n</think>\n\nYes<|im_end|>\n"
    )
    without = encoder.scored_ids(USER, prompt_ids, sampled(encoder, "Yes"))
    assert encoder.tokenizer.decode(without[len(prompt_ids) :]) == "<think>\n\n</think>\n\nYes<|im_end|>\n"


@pytest.mark.parametrize("name", ["qwen3", "qwen3_8", "gptoss", "muse_glimmer", "qwen2_5", "gemma3"])
def test_cut_and_ended_responses_have_one_form_that_of_samples(name):
    encoder = TextEncoder(chat.shipped_tokenizer(name))
    words = encoder.tokenizer("Yes", add_special_tokens=False)["input_ids"]
    assert encoder.response_ids(USER, "Yes", ended=False) == words
    assert encoder.response_ids(USER, "Yes") == [*words, encoder.end_ids[0]] == sampled(encoder, "Yes")


def test_a_template_without_an_end_gets_the_one_that_samples_have():
    template = "{% for m in messages %}\n{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    template += "{% if add_generation_prompt %}\nassistant: {% endif %}"
    encoder = TextEncoder(chat.tokenizer_of(template, "<|end|>"))
    assert encoder.response_ids(USER, "Yes") == sampled(encoder, "Yes")
    read = encoder.scored_ids(USER, encoder.prompt_ids(USER), sampled(encoder, "Yes"))
    assert read == encoder.rendered_ids(USER, "Yes")  # as RewardTrainer, which adds none to a conversation


@pytest.mark.parametrize("name", [name for name in chat.shipped() if not name.startswith("glm4moe")])
def test_blanks_around_an_answer_are_read_as_they_were_trained(name):
    encoder = TextEncoder(chat.shipped_tokenizer(name))
    answer = " Yes\n"
    ids = encoder.scored_ids(USER, encoder.prompt_ids(USER), sampled(encoder, answer))
    wanted = encoder.rendered_ids(USER, answer)
    assert ids == wanted
    longest = len(encoder.prompt_ids(USER)) + len(sampled(encoder, answer)) + encoder.added_length(USER)
    assert len(ids) <= longest + 2  # blanks between header and answer may be written twice


def test_a_document_gets_one_end():
    encoder = TextEncoder(chat.tokenizer_of(chat.CHATML, "<|im_end|>"))
    for row in ({"text": "a<|im_end|>"}, {"text": "a"}, {"prompt": "", "completion": "a"}):
        assert encoder.tokenizer.decode(encoder.document_ids(row)) == "a<|im_end|>"


def test_options_of_the_template_reach_it():
    tokenizer = chat.shipped_tokenizer("qwen3")
    encoder = TextEncoder(tokenizer, chat_template_kwargs={"enable_thinking": False})
    assert tokenizer.decode(encoder.prompt_ids(USER)).endswith("<think>\n\n</think>\n\n")


def test_a_blank_before_the_answer_is_the_policys_to_write():
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}User: {{ m['content'] }}\nBot:{% else %} {{ m['content'] }}"
        "{{ eos_token }}{% endif %}{% endfor %}"
    )
    encoder = TextEncoder(chat.tokenizer_of(template, "<|end|>"))
    prompt_ids = encoder.prompt_ids(USER)
    ids = encoder.scored_ids(USER, prompt_ids, sampled(encoder, " Yes"))
    assert ids == encoder.rendered_ids(USER, "Yes")


def test_a_template_that_rewrites_answers_is_rendered_anew():
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | upper }}<|end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    encoder = TextEncoder(chat.tokenizer_of(template, "<|end|>"))
    ids = encoder.scored_ids(USER, encoder.prompt_ids(USER), sampled(encoder, "yes"))
    assert ids == encoder.rendered_ids(USER, "yes")
    assert encoder.tokenizer.decode(ids).endswith("[assistant]YES<|end|>\n")


@pytest.mark.parametrize("pad", ["<pad>", None])
def test_plain_texts_end_as_reward_trainer_ends_them(pad):
    tokenizer = tiny_tokenizer(pad_token=pad)
    encoder = TextEncoder(tokenizer)
    wanted = trl_ids(tokenizer, [{"prompt": "w1 w2", "chosen": " w3 w4"}])[0]
    assert encoder.rendered_ids("w1 w2", " w3 w4") == wanted
    ids = encoder.scored_ids("w1 w2", encoder.prompt_ids("w1 w2"), encoder.response_ids("w1 w2", " w3 w4"))
    assert ids == read_by_a_classifier(wanted, tokenizer.pad_token_id)


def test_the_end_token_that_only_the_generation_config_names():
    tokenizer = chat.tokenizer_of(chat.CHATML, "<bos>")
    config = type("Config", (), {"eos_token_id": [tokenizer.convert_tokens_to_ids("<|im_end|>")]})
    ends = end_token_ids(tokenizer, config)
    assert set(ends) == {tokenizer.eos_token_id, *config.eos_token_id}
    encoder = TextEncoder(tokenizer, ends)
    assert tokenizer.decode(encoder.response_ids(USER, "Yes")) == "Yes<|im_end|>"


def test_the_text_of_a_response_keeps_its_leading_space_behind_a_plain_prompt():
    encoder = TextEncoder(chat.tokenizer_of(chat.CHATML, "<|im_end|>"))
    prompt_ids = encoder.prompt_ids("Hi")
    assert encoder.response_text("Hi", prompt_ids, sampled(encoder, " there")) == " there"
    assert encoder.completion("Hi", " there") == " there"
    assert encoder.completion(USER, "Yes") == [{"role": "assistant", "content": "Yes"}]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("  ", "empty prompt"),
        (None, "empty prompt"),
        ([], "empty prompt"),
        (7, "a int"),
        ({"role": "user"}, "a dict"),
        (["Hi"], "message 0"),
        ([{"content": "Hi"}], "message 0"),
        ([{"role": "user"}], "message 0"),
        ([{"role": "user", "content": ""}], "empty prompt"),
    ],
)
def test_a_prompt_that_is_none_is_refused_with_its_row(prompt, words):
    with pytest.raises(ValueError, match=f"train_dataset row 3.*{words}"):
        check_prompt(prompt, "train_dataset row 3")


def test_texts_and_conversations_are_not_mixed():
    check_prompts(["a", "b"], "train_dataset")
    check_prompts([USER, USER], "train_dataset")
    with pytest.raises(ValueError, match="train_dataset mixes texts and conversations: row 0 is a str, row 1 a list"):
        check_prompts(["a", USER], "train_dataset")


def test_small_helpers():
    assert until_end([5, 1, 7], [1]) == [5, 1]
    assert until_end([5, 7], [1]) == [5, 7]
    assert message_text([{"content": "a"}, {"content": None}, {"content": "b"}]) == "ab"
    assert message_text([{"content": [{"type": "text", "text": "a"}, {"type": "image"}]}]) == "a"
    assert (longest(None, 64), longest(None, None), longest(32, 64)) == (64, 1024, 32)
    with pytest.raises(ValueError, match="max_length=65 exceeds the model's 64 positions"):
        longest(65, 64)
    ids, mask = pad_ids([[1, 0], [2]], 0, left=True)
    assert (ids.tolist(), mask.tolist()) == ([[1, 0], [0, 2]], [[1, 1], [0, 1]])
    assert pad_ids([[], []], 0, left=False)[1].tolist() == [[0], [0]]


def test_a_tokenizer_without_an_end_token_is_refused():
    with pytest.raises(ValueError, match="no eos_token"):
        TextEncoder(tiny_tokenizer(eos_token=None))
