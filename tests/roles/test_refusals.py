"""Bad input: an error before the base's weights are loaded, that names the argument, its value and the remedy."""

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig
from safetensors.torch import load_file, save_file

from trl_ext.roles import AdapterWeights, Role, SharedBaseModel, read_adapter, shared_model
from trl_ext.roles.adapters import CONFIG_FILE, WEIGHTS_FILE, check_lora_config, write_adapter


@pytest.fixture
def folders(make_base, make_adapter, tmp_path, monkeypatch):
    """A base and a sound policy and reward adapter for it on disk; loading the base's weights fails the test."""
    base = make_base()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    for name, head in (("policy", False), ("reward", True)):
        adapter = make_adapter(base, head=head)
        adapter.config.base_model_name_or_path = str(tmp_path / "base")
        write_adapter(tmp_path / name, adapter)

    def load_base(*args, **kwargs):
        raise AssertionError("the weights of the base were loaded before the check")

    monkeypatch.setattr(shared_model, "load_base", load_base)
    return tmp_path


def rewrite(folder, change):
    """Change the tensors of an adapter on disk."""
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


def reconfigure(folder, **fields):
    config = LoraConfig.from_pretrained(str(folder))
    for name, value in fields.items():
        setattr(config, name, value)
    config.save_pretrained(str(folder))


def load(folders, **options):
    return SharedBaseModel.from_pretrained(str(folders / "base"), **options)


def refused(match, error=ValueError):
    return pytest.raises(error, match=match)


def test_sound_adapters_get_as_far_as_the_weights(folders):
    with refused("were loaded", AssertionError):
        load(folders, policy_adapter=folders / "policy", reward_adapter=folders / "reward")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "gpt_neo"])
def test_an_adapter_of_another_hidden_size(folders, make_base, make_adapter, kind):
    other = make_base(kind, **{"n_embd" if kind == "gpt2" else "hidden_size": 32})
    write_adapter(folders / "wide", make_adapter(other))
    make_base(kind).save_pretrained(folders / "base")
    with refused(r"policy_adapter .*does not fit, .*lora_[AB].weight has 32 .*puts, .* has 16.*another base"):
        load(folders, policy_adapter=folders / "wide")


def test_a_head_of_another_hidden_size(folders):
    rewrite(folders / "reward", lambda t: t.update({"base_model.model.score.weight": torch.zeros(1, 32)}))
    with refused(r"reward_adapter .*hidden size 32.*has 16.*another base"):
        load(folders, reward_adapter=folders / "reward")


def test_a_head_with_two_labels(folders):
    rewrite(folders / "reward", lambda t: t.update({"base_model.model.score.weight": torch.zeros(2, 16)}))
    with refused(r"reward_adapter .*score.weight.*\(2, 16\).*num_labels=1"):
        load(folders, reward_adapter=folders / "reward")


def test_saved_embeddings(folders):
    rewrite(folders / "policy", lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.zeros(50, 16)}))
    with refused(r"policy_adapter .*embed_tokens.weight.*\(50, 16\).*without resizing the embeddings"):
        load(folders, policy_adapter=folders / "policy")


def test_a_reward_adapter_as_policy(folders):
    with refused(r"policy_adapter .*it has a scalar head.*Give it as reward_adapter"):
        load(folders, policy_adapter=folders / "reward")
    rewrite(folders / "reward", lambda t: t.pop("base_model.model.score.weight"))
    with refused(r"policy_adapter .*task_type is 'SEQ_CLS', but .* has no score.weight"):
        load(folders, policy_adapter=folders / "reward")


@pytest.mark.parametrize("length", [0, 7, 200, -1])
@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_file_that_is_torn(folders, file, length):
    path = folders / "policy" / file
    path.write_bytes(path.read_bytes()[: length if length >= 0 else -3])
    with refused(rf"policy_adapter: .*policy/{file}.* cut while it was written"):
        load(folders, policy_adapter=folders / "policy")


@pytest.mark.parametrize("text", ["[]", "{}", '{"peft_type": "NONE"}', "\x00" * 40])
def test_a_configuration_that_is_none(folders, text):
    (folders / "policy" / CONFIG_FILE).write_text(text)
    with refused("policy_adapter", (ValueError, TypeError)):
        load(folders, policy_adapter=folders / "policy")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(folders, value):
    def spoil(tensors):
        tensors["base_model.model.score.weight"][0, 3] = value

    rewrite(folders / "reward", spoil)
    with refused(rf"reward_adapter: 1 of the 29 .*reward/{WEIGHTS_FILE} hold NaN or infinity, first '.*score.weight'"):
        load(folders, reward_adapter=folders / "reward")


def test_a_reward_adapter_without_a_head(folders):
    with refused(r"reward_adapter.*num_labels=1"):
        load(folders, reward_adapter=folders / "policy")


def test_weights_in_a_pickle_only(folders):
    torch.save(load_file(folders / "policy" / WEIGHTS_FILE), folders / "policy" / "adapter_model.bin")
    (folders / "policy" / WEIGHTS_FILE).unlink()
    with refused(r"policy_adapter: .*policy holds no adapter_model.safetensors.*safe_serialization=True"):
        load(folders, policy_adapter=folders / "policy")


def test_a_folder_that_is_no_adapter(folders):
    with refused(rf"critic_adapter: .*base holds no {CONFIG_FILE}.*that PEFT saved", FileNotFoundError):
        load(folders, critic_adapter=folders / "base")


@pytest.mark.parametrize("path", ["out/polcy", "out/run/policy", "/no/such/folder", "polcy"])
def test_a_path_that_is_not_there(folders, path):
    with refused(f"policy_adapter: {path} is not a folder", FileNotFoundError):
        load(folders, policy_adapter=path)


def test_policy_adapter_and_peft_config_together(folders):
    with refused(r"policy_adapter and peft_config.*Drop peft_config"):
        load(folders, policy_adapter=folders / "policy", peft_config=LoraConfig())


BAD_CONFIGS = {
    "use_dora": ({"use_dora": True}, "use_dora=True.*use_dora=False"),
    "bias": ({"bias": "all"}, "bias='all'.*bias='none'"),
    "lora_bias": ({"lora_bias": True}, "lora_bias=True.*lora_bias=False"),
    "tokens": ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices=.*embeddings"),
    "parameters": ({"target_parameters": ["a.weight"]}, "target_parameters=.*target_modules"),
    "rank": ({"r": 0}, "r has 0, .*at least 1"),
    "alpha": ({"lora_alpha": float("nan")}, "lora_alpha has nan, .*finite"),
    "alpha of a layer": ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern has 'x', .*finite"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'.*init_lora_weights=True"),
    "replication": ({"layer_replication": [(0, 1)]}, "layer_replication=.*layers"),
    "alora": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens=.*passes"),
    "saved module": ({"modules_to_save": ["embed_tokens"]}, r"modules_to_save=\['embed_tokens'\].*LoRA"),
    "lm_head": ({"target_modules": ["q_proj", "lm_head"]}, r"target_modules=\['lm_head'\].*Remove it"),
    "lm_head as a string": ({"target_modules": "lm_head"}, r"target_modules=\['lm_head'\].*Remove it"),
    "embeddings": ({"target_modules": ["model.embed_tokens"]}, r"target_modules=.*embed_tokens'\].*Remove it"),
}


@pytest.mark.parametrize(("fields", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
@pytest.mark.parametrize("how", ["peft_config", "policy_adapter", "reward_adapter"])
def test_lora_that_roles_cannot_serve(folders, fields, message, how):
    if how == "peft_config":
        bad = LoraConfig()
        for name, value in fields.items():
            setattr(bad, name, value)
        options = {"peft_config": bad}
    else:
        folder = folders / how.removesuffix("_adapter")
        reconfigure(folder, **fields)
        options = {how: folder}
    with refused(f"(?s){how}.*{message}"):
        load(folders, **options)


@pytest.mark.parametrize("init", [False, "orthogonal"])
def test_a_fresh_policy_that_is_not_the_base(folders, init):
    with refused(f"peft_config: init_lora_weights={init!r}.*init_lora_weights=True"):
        load(folders, peft_config=LoraConfig(init_lora_weights=init))
    reconfigure(folders / "policy", init_lora_weights=init)  # of no account where trained weights replace it
    with refused("were loaded", AssertionError):
        load(folders, policy_adapter=folders / "policy")


def test_another_kind_of_adapter(folders):
    with refused(r"peft_config.*peft.LoraConfig.*IA3Config", TypeError):
        load(folders, peft_config=IA3Config())
    IA3Config(base_model_name_or_path="base").save_pretrained(str(folders / "policy"))
    with refused(r"policy_adapter .*peft.LoraConfig.*IA3Config", TypeError):
        load(folders, policy_adapter=folders / "policy")


@pytest.mark.parametrize("pattern", [r".*(q_proj|lm_head)", r".*embed_tokens"])
def test_a_pattern_that_reaches_the_shared_modules(make_base, pattern):
    """Which modules a pattern reaches is known only on the model itself."""
    base = make_base()
    assert check_lora_config(LoraConfig(target_modules=pattern), "peft_config")
    with refused(r"target_modules.*LM head or the embeddings.*all-linear"):
        SharedBaseModel(base, LoraConfig(target_modules=pattern))


def test_weights_that_do_not_fit_the_modules(make_base, make_adapter):
    base = make_base()
    adapter = make_adapter(base)
    first, *_ = adapter.weights
    missing = {key: value for key, value in adapter.weights.items() if key != first}
    with refused(f"policy adapter does not fit.*1 weights.*{first}.*target_modules"):
        SharedBaseModel(copy.deepcopy(base), policy=AdapterWeights(adapter.config, missing))
    deeper = make_adapter(make_base(num_hidden_layers=3))
    with refused(r"critic adapter: it does not fit, .*layers\.2.*another base"):
        SharedBaseModel(copy.deepcopy(base), critic=deeper)


def test_read_adapter_gives_what_was_written(make_base, make_adapter, tmp_path):
    adapter = make_adapter(make_base(), head=True)
    write_adapter(tmp_path, adapter)
    again = read_adapter(tmp_path)
    assert torch.equal(again.head, adapter.head)
    assert again.weights.keys() == adapter.weights.keys()
    assert all(torch.equal(again.weights[key], value) for key, value in adapter.weights.items())
    assert (again.config.r, again.config.lora_alpha) == (adapter.config.r, adapter.config.lora_alpha)
    assert Role.REWARD.value == "reward"
