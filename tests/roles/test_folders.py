"""Roles on disk and on the Hub: what is written, what comes back, what would be uploaded."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

from trl_ext.roles import Role, SharedBaseModel

ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}


def build(make_base, make_adapter, seed=1, reward=True, **options):
    base = make_base()
    head = make_adapter(base, seed=seed + 1, head=True, **options)
    return SharedBaseModel(base, policy=make_adapter(base, seed=seed, **options), reward=head if reward else None)


@pytest.fixture
def model(make_base, make_adapter):
    """All four roles, each with weights of its own."""
    model = build(make_base, make_adapter)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


def files(folder):
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


def resume(model, folder):
    """The calls of `Trainer._load_from_checkpoint`."""
    model.load_adapter(str(folder), "default", is_trainable=True)
    for sub in sorted(path.name for path in Path(folder).iterdir() if path.is_dir()):
        model.load_adapter(str(Path(folder) / sub), sub, is_trainable=False)
    model.set_adapter("default")


def test_a_checkpoint_is_the_policy_and_a_folder_for_each_other_role(model, tmp_path):
    model.save_pretrained(str(tmp_path))
    subfolders = {f"{role.value}/{name}" for role in Role if role is not Role.POLICY for name in ADAPTER}
    assert files(tmp_path) == ADAPTER | subfolders
    for name in files(tmp_path):
        assert not name.endswith((".bin", ".pt", ".pth", ".pkl"))
    tasks = {role: json.loads((tmp_path / role.value / "adapter_config.json").read_text())["task_type"] for role in
             (Role.REFERENCE, Role.REWARD, Role.CRITIC)}  # fmt: skip
    assert tasks == {Role.REFERENCE: "CAUSAL_LM", Role.REWARD: "SEQ_CLS", Role.CRITIC: "SEQ_CLS"}


def test_the_keys_are_those_of_peft(model, tmp_path):
    model.save_pretrained(str(tmp_path))
    policy, critic = (load_file(tmp_path / sub / "adapter_model.safetensors") for sub in ("", "critic"))
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in policy
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in policy)
    assert critic.keys() - policy.keys() == {"base_model.model.score.weight"}


def test_only_the_main_process_writes(model, tmp_path):
    model.save_pretrained(str(tmp_path / "out"), is_main_process=False)
    assert not (tmp_path / "out").exists()


def test_a_model_card_is_written_where_there_is_one(model, tmp_path):
    model.model_card = lambda: "# what it is"
    model.save_pretrained(str(tmp_path))
    assert (tmp_path / "README.md").read_text() == "# what it is"
    assert (tmp_path / "adapter_config.json").is_file()


def test_resuming_brings_every_role_back(model, make_base, make_adapter, tmp_path):
    model.save_pretrained(str(tmp_path))
    other = build(make_base, make_adapter, seed=5)
    flags = [p.requires_grad for p in other.parameters()]
    resume(other, tmp_path)
    for (name, parameter), (_, value) in zip(other.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(parameter, value), name
    assert [p.requires_grad for p in other.parameters()] == flags
    assert other.active_role is Role.POLICY


def test_resuming_with_other_roles_is_refused(model, make_base, make_adapter, tmp_path):
    model.save_pretrained(str(tmp_path / "four"))
    without = build(make_base, make_adapter, reward=False)
    without.save_pretrained(str(tmp_path / "three"))
    with pytest.raises(ValueError, match=r"'critic', 'reference', 'reward'\].*'critic', 'reference'\].*Resume with"):
        resume(without, tmp_path / "four")
    with pytest.raises(ValueError, match=r"'critic', 'reference'\].*'critic', 'reference', 'reward'\].*Resume with"):
        resume(model, tmp_path / "three")
    with pytest.raises(ValueError, match="'ref'"):
        model.load_adapter(str(tmp_path / "four"), "ref")
    model.save_adapter(Role.REFERENCE, tmp_path / "headless")
    with pytest.raises(ValueError, match=r"critic adapter has no head.*not complete"):
        model.load_adapter(str(tmp_path / "headless"), "critic")


def test_resuming_with_other_shapes_or_another_scaling_is_refused(model, make_base, make_adapter, tmp_path):
    model.save_pretrained(str(tmp_path))
    for options, field in (({"r": 2}, "r"), ({"lora_alpha": 32}, "lora_alpha"), ({"use_rslora": True}, "use_rslora")):
        with pytest.raises(ValueError, match=rf"policy adapter was trained with {field}=.*Resume with"):
            resume(build(make_base, make_adapter, **options), tmp_path)
    with pytest.raises(ValueError, match=r"policy adapter does not fit.*target_modules"):
        resume(build(make_base, make_adapter, target_modules=["q_proj"]), tmp_path)


def test_the_bare_base_has_nothing_to_save(make_base, tmp_path):
    model = SharedBaseModel(make_base())
    with pytest.raises(ValueError, match="reference role has no adapter"):
        model.save_adapter(Role.REFERENCE, tmp_path)
    model.save_pretrained(str(tmp_path))
    assert files(tmp_path) == ADAPTER | {f"critic/{name}" for name in ADAPTER}


@pytest.fixture
def hub(monkeypatch):
    """What `HfApi` is asked for, with the files of the folder at that moment; nothing leaves the machine."""
    calls = []

    def create_repo(self, repo_id, **options):
        calls.append(SimpleNamespace(call="create_repo", token=self.token, repo_id=repo_id, **options))
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, **options):
        content = {name: (Path(folder_path) / name).read_bytes() for name in files(folder_path)}
        calls.append(SimpleNamespace(call="upload_folder", repo_id=repo_id, content=content, options=options))
        return "https://hub/commit/1"

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return calls


@pytest.mark.parametrize("role", list(Role))
def test_pushing_a_role_uploads_exactly_its_adapter(model, hub, tmp_path, role):
    address = model.push_adapter_to_hub(role, "me/model", private=True, token="secret", commit_message="done")
    assert address == "https://hub/commit/1"
    create, upload = hub
    assert (create.call, create.repo_id, create.private, create.exist_ok) == ("create_repo", "me/model", True, True)
    assert create.token == "secret"
    assert (upload.call, upload.repo_id, upload.options) == ("upload_folder", "me/model", {"commit_message": "done"})
    model.save_adapter(role, tmp_path)
    assert upload.content.keys() == ADAPTER
    assert upload.content == {name: (tmp_path / name).read_bytes() for name in ADAPTER}


def test_a_repository_without_an_owner_is_the_users(model, hub):
    model.push_adapter_to_hub(Role.POLICY, "model")
    assert hub[1].repo_id == "me/model"


def test_a_pushed_policy_loads_in_plain_peft(make_base, make_adapter, hub, tmp_path, batch):
    make_base().save_pretrained(tmp_path / "base")
    base = make_base()
    base.name_or_path = str(tmp_path / "base")
    model = SharedBaseModel(base, policy=make_adapter(base))
    model.push_adapter_to_hub(Role.POLICY, "me/model")
    (tmp_path / "pulled").mkdir()
    for name, content in hub[1].content.items():
        (tmp_path / "pulled" / name).write_bytes(content)
    with torch.no_grad():
        plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "pulled").eval()
        inputs = {"input_ids": batch[0], "attention_mask": batch[1]}
        torch.testing.assert_close(plain(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-5)
