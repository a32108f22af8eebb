"""What a run leaves behind loads with plain PEFT, and what is uploaded is the same, with our model card."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification

from tests.ppo import tiny
from trl_ext import Role
from trl_ext.report.cards import ROWS, changed_options

IDS = torch.tensor([[6, 7, 8, 9, 1]])
FILES = {"adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """A trained trainer that has saved its model."""
    folder = tmp_path_factory.mktemp("my-policy")
    trainer = tiny.trainer(world, folder, reward_clip=0.5, max_steps=3, eval_dataset=tiny.prompts(4))
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    return trainer


def folder_of(trainer) -> Path:
    return Path(trainer.args.output_dir)


def logits_of(trainer):
    model = trainer.model.eval()
    with torch.no_grad(), model.role(Role.POLICY):
        return model.get_base_model()(IDS).logits


def check_card(text: str, base: str) -> None:
    """A header that the Hub can read, and every part that a reader needs."""
    header = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])
    assert header["library_name"] == "peft"
    assert {"ppo", "trl_ext"} <= set(header["tags"])
    assert len(header["tags"]) == len(set(header["tags"]))
    assert f"`{Path(base).name}`" in text
    assert str(Path(base).parent) not in text  # no folder of this machine
    assert "2307.04964" in text
    assert "AutoPeftModelForCausalLM" in text
    assert "| `reward_clip` | 0.5 |" in text


def test_the_policy_loads_with_plain_peft(finished):
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder_of(finished)).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, logits_of(finished), rtol=0, atol=1e-6)
        with loaded.disable_adapter():
            assert (loaded(IDS).logits - logits_of(finished)).abs().max() > 1e-3  # the adapter does something


@pytest.mark.parametrize("role", [Role.REWARD, Role.CRITIC])
def test_reward_and_critic_lie_beside_it_as_sequence_classifiers(finished, role):
    folder = folder_of(finished) / role.value
    assert {path.name for path in folder.iterdir()} >= FILES
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    with torch.no_grad():
        score = loaded(IDS).logits[0, 0]
    ones = torch.ones_like(IDS)
    model = finished.model
    own = model.score(IDS, ones)[0] if role is Role.REWARD else model.values(IDS, ones)[0, -1]
    torch.testing.assert_close(score, own, rtol=1e-5, atol=1e-6)


def test_the_reference_is_kept_too(finished):
    assert {path.name for path in (folder_of(finished) / "reference").iterdir()} >= FILES


def test_the_card_says_what_was_done(finished, world):
    text = (folder_of(finished) / "README.md").read_text()
    check_card(text, str(world / "base"))
    assert text.count("\n# ") == 1
    assert f"# {folder_of(finished).name}" in text
    assert "base_model:" not in text  # a folder is none the Hub would know
    header, _, *rows = re.findall(r"^\|.*\|$", text.split("## The run")[1], re.MULTILINE)
    assert header.startswith("| step | reward | kl | beta |")
    assert [row.split("|")[1].strip() for row in rows] == ["1", "2", "3"]
    for value in re.findall(r"`(\w+)` \| ", text):
        assert value not in ("output_dir", "hub_token")


def test_the_card_names_a_base_of_the_hub(finished, monkeypatch):
    monkeypatch.setattr(finished.model.get_base_model(), "name_or_path", "someone/base")
    finished.create_model_card(model_name="mine", dataset_name="someone/prompts", tags=["ppo", "extra"])
    text = (folder_of(finished) / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["base_model"] == "someone/base"
    assert header["datasets"] == ["someone/prompts"]
    assert header["tags"].count("ppo") == header["tags"].count("extra") == 1
    assert "# mine" in text


def test_a_long_run_fits_the_table(finished, monkeypatch):
    history = [{"step": i, "reward": float(i), "kl": None} for i in range(1, 101)]
    monkeypatch.setattr(finished.state, "log_history", history)
    finished.create_model_card()
    table = (folder_of(finished) / "README.md").read_text().split("## The run")[1]
    steps = [int(step) for step in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)]
    assert len(steps) == ROWS
    assert (steps[0], steps[-1]) == (1, 100)


def test_changed_options_are_those_that_were_changed(tmp_path):
    assert changed_options(tiny.config(tmp_path, vf_coef=0.5))["vf_coef"] == 0.5
    assert "vf_coef" not in changed_options(tiny.config(tmp_path))
    assert not {"output_dir", "report_to"} & set(changed_options(tiny.config(tmp_path)))


def test_a_checkpoint_has_a_card_and_all_roles(world, tmp_path):
    trainer = tiny.trainer(world, tmp_path, reward_clip=0.5, save_strategy="steps", save_steps=2)
    trainer.train()
    for folder in (tmp_path, tmp_path / "checkpoint-2"):  # TRL writes its own card into the first
        check_card((folder / "README.md").read_text(), str(world / "base"))
    for name in ("", "reference", "reward", "critic"):
        assert {path.name for path in (tmp_path / "checkpoint-2" / name).iterdir()} >= FILES


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The Hub: a folder that keeps what would be uploaded, one copy for each upload."""
    uploads: list[tuple[str, Path]] = []

    def create_repo(self, repo_id, **kwargs):
        return SimpleNamespace(repo_id=repo_id, url=f"https://hub/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns=(), **kwargs):
        copy = tmp_path / f"upload-{len(uploads)}"
        shutil.copytree(folder_path, copy, ignore=shutil.ignore_patterns(*(ignore_patterns or ())))
        uploads.append((repo_id, copy))
        return "https://hub/commit"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    return uploads


def test_push_to_hub_uploads_all_roles_and_our_card(world, tmp_path, hub):
    options = {"push_to_hub": True, "hub_model_id": "me/my-policy", "hub_strategy": "end"}
    trainer = tiny.trainer(world, tmp_path / "out", reward_clip=0.5, **options)
    trainer.train()
    trainer.push_to_hub()
    repo, uploaded = hub[-1]
    assert repo == "me/my-policy"
    text = (uploaded / "README.md").read_text()
    check_card(text, str(world / "base"))
    assert "# my-policy" in text
    for name in ("", "reference", "reward", "critic"):
        assert {path.name for path in (uploaded / name).iterdir()} >= FILES
    loaded = AutoPeftModelForCausalLM.from_pretrained(uploaded).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, logits_of(trainer), rtol=0, atol=1e-6)


def test_one_role_can_be_uploaded_alone(finished, hub):
    finished.model.push_adapter_to_hub(Role.CRITIC, "me/my-critic")
    repo, uploaded = hub[-1]
    assert repo == "me/my-critic"
    assert {path.name for path in uploaded.iterdir()} >= FILES
