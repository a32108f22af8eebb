"""Which base an adapter belongs to: by what it is and holds, not by its name."""

import copy
import os
import warnings

import pytest
import torch
from peft import PeftModel
from transformers import BitsAndBytesConfig

from trl_ext.roles import Role, SharedBaseModel, adapters, identity, load_base, read_adapter, tuned_policy
from trl_ext.roles.adapters import WEIGHTS_FILE, write_adapter
from trl_ext.roles.identity import record_of


def saved_policy(base, make_adapter, folder):
    """A policy adapter that a model on this base wrote."""
    model = SharedBaseModel(copy.deepcopy(base), make_adapter(base))
    model.save_adapter(Role.POLICY, folder)
    return folder


def load_on(folder, adapter, **options):
    return SharedBaseModel.from_pretrained(str(folder), policy_adapter=adapter, **options)


@pytest.fixture(params=["llama", "gpt2", "gpt_neox"])
def base(make_base, request):
    return make_base(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loaded_in", ["float32", "bfloat16", "float16"])
def test_the_same_weights_at_another_place_are_the_same_base(make_base, make_adapter, tmp_path, dtype, loaded_in):
    base = make_base(dtype=dtype)
    base.name_or_path = "someone/base"
    saved_policy(base, make_adapter, tmp_path / "policy")
    base.save_pretrained(tmp_path / "snapshot")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_on(tmp_path / "snapshot", tmp_path / "policy", dtype=loaded_in)


def test_a_4_bit_base_is_the_same_base(make_base, make_adapter, tmp_path):
    pytest.importorskip("bitsandbytes")
    base = make_base(hidden_size=64, intermediate_size=128, dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    in_4_bits = load_base(str(tmp_path / "base"), quantization_config=quantization)
    assert 0 < len(record_of(in_4_bits).values) < len(record_of(base).values)
    saved_policy(base, make_adapter, tmp_path / "policy")
    load_on(tmp_path / "base", tmp_path / "policy", quantization_config=quantization)
    SharedBaseModel(in_4_bits, read_adapter(tmp_path / "policy")).save_adapter(Role.POLICY, tmp_path / "of 4 bits")
    load_on(tmp_path / "base", tmp_path / "of 4 bits")
    make_base(hidden_size=64, intermediate_size=128, seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="policy adapter: it was trained on other weights"):
        load_on(tmp_path / "other", tmp_path / "of 4 bits", quantization_config=quantization)


def test_other_weights_of_the_same_name_are_another_base(base, make_base, make_adapter, tmp_path):
    saved_policy(base, make_adapter, tmp_path / "policy")
    other = make_base(base.config.model_type, seed=1)
    other.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"policy adapter: it was trained on other weights: .*first '.*Give the base"):
        load_on(tmp_path / "base", tmp_path / "policy")


def test_one_unit_in_the_last_place_of_bfloat16_makes_another_base(make_base, make_adapter, tmp_path):
    base = make_base(dtype=torch.bfloat16)
    saved_policy(base, make_adapter, tmp_path / "policy")
    for parameter in base.parameters():
        parameter.data.mul_(1 + 2**-7)  # one unit in the last place
    base.save_pretrained(tmp_path / "base")
    for dtype in ("bfloat16", "float32"):
        with pytest.raises(ValueError, match="other weights"):
            load_on(tmp_path / "base", tmp_path / "policy", dtype=dtype)
    with pytest.raises(ValueError, match="other weights"):
        tuned_policy(str(tmp_path / "base"), tmp_path / "policy")


def test_a_resized_vocabulary_leaves_the_base_the_same(make_base, make_adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "WINDOW", 512)  # the embeddings of a real model are larger than its window
    base = make_base(tie_word_embeddings=False)
    saved_policy(base, make_adapter, tmp_path / "policy")
    base.resize_token_embeddings(56)
    window = [
        t for t, v in record_of(base).values.items() if v == read_adapter(tmp_path / "policy").trained_on.values[t]
    ]
    assert len(window) >= len(record_of(base).values) - 2  # all but the two that have grown


def test_another_model_type_is_another_base(make_base, make_adapter, tmp_path):
    saved_policy(make_base(), make_adapter, tmp_path / "policy")
    make_base("mistral", num_key_value_heads=1).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"policy_adapter .*base of model type 'llama', this one is 'mistral'"):
        load_on(tmp_path / "base", tmp_path / "policy")


def test_a_checkpoint_of_another_base_is_not_resumed(make_base, tmp_path):
    SharedBaseModel(make_base()).save_pretrained(str(tmp_path))
    other = SharedBaseModel(make_base(seed=1))
    with pytest.raises(ValueError, match="the policy adapter: it was trained on other weights"):
        other.load_adapter(str(tmp_path), "default")


def test_of_a_foreign_adapter_another_name_is_a_warning(make_base, make_adapter, tmp_path):
    base = make_base()
    base.save_pretrained(tmp_path / "base")
    adapter = make_adapter(base)
    for trained_on, warned in (
        ("someone/other", True),
        ("someone/BASE", False),
        ("/cache/models--someone--base/snapshots/0123", False),
    ):
        adapter.config.base_model_name_or_path = trained_on
        write_adapter(tmp_path / "policy", adapter)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load_on(tmp_path / "base", tmp_path / "policy")
        said = [str(w.message) for w in caught if "was trained on" in str(w.message)]
        assert len(said) == warned, said


def test_the_record_is_not_in_the_way_of_peft(make_base, make_adapter, batch, tmp_path):
    base = make_base()
    adapter = make_adapter(base)
    model = SharedBaseModel(copy.deepcopy(base), adapter)
    model.save_adapter(Role.POLICY, tmp_path / "ours")
    plain = PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(*batch).logits, model(*batch).logits, rtol=0, atol=1e-5)
    plain.save_pretrained(tmp_path / "peft")
    assert read_adapter(tmp_path / "ours").trained_on == model.base_record
    assert read_adapter(tmp_path / "peft").trained_on is None
    once = (tmp_path / "ours" / WEIGHTS_FILE).read_bytes()
    for _ in range(4):
        model.save_adapter(Role.POLICY, tmp_path / "ours")
        assert (tmp_path / "ours" / WEIGHTS_FILE).read_bytes() == once


def test_a_kill_while_an_adapter_is_written_leaves_the_one_before(make_base, make_adapter, tmp_path, monkeypatch):
    base = make_base()
    before, after = make_adapter(base, seed=1, head=True), make_adapter(base, seed=2, head=True)
    write_adapter(tmp_path, before)
    names = {path.name for path in tmp_path.iterdir()}

    class Killed(BaseException):
        pass

    def killed(*args):
        raise Killed

    monkeypatch.setattr(adapters.os, "fsync", killed)
    with pytest.raises(Killed):
        write_adapter(tmp_path, after)
    monkeypatch.undo()
    assert torch.equal(read_adapter(tmp_path).head, before.head)
    assert {path.name for path in tmp_path.iterdir()} == names
    renamed = []
    monkeypatch.setattr(adapters.os, "replace", lambda a, b, real=os.replace: (renamed.append(b.name), real(a, b)))
    write_adapter(tmp_path, after)
    assert set(renamed) == names
    assert torch.equal(read_adapter(tmp_path).head, after.head)


def test_a_role_that_does_not_equal_its_file_is_an_error(make_base, make_adapter, monkeypatch):
    base = make_base()
    monkeypatch.setattr("trl_ext.roles.switch.set_peft_model_state_dict", lambda *args, **kwargs: None)
    with pytest.raises(RuntimeError, match=r"the policy adapter: .* was loaded, but the model has other numbers there"):
        SharedBaseModel(base, make_adapter(base))
