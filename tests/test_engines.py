"""Which engines are refused, and when a checkpoint can be gone on from."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch import nn

from trl_ext.engines import batch_of, check_engine, check_same_batch, keep_untrained, resume_from
from trl_ext.roles.sharding import same_number_of_passes, shared_out, total_norm, whole, with_weights


def plugin(**options):
    defaults = {
        "fsdp_version": 2,
        "state_dict_type": "StateDictType.FULL_STATE_DICT",
        "activation_checkpointing": False,
        "cpu_ram_efficient_loading": False,
    }
    return SimpleNamespace(**(defaults | options))


def accelerator(kind="NO", stage=None, processes=1, **fsdp):
    deepspeed = None if stage is None else SimpleNamespace(zero_stage=stage)
    state = SimpleNamespace(deepspeed_plugin=deepspeed, fsdp_plugin=plugin(**fsdp) if kind == "FSDP" else None)
    return SimpleNamespace(distributed_type=DistributedType(kind), state=state, num_processes=processes)


def arguments(per_device, accumulation, rollout=None, **options):
    batch = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation}
    if rollout is not None:
        batch |= {"generation_batch_size": rollout, "steps_per_generation": accumulation}
    return SimpleNamespace(**batch, **options)


@pytest.mark.parametrize(("kind", "stage"), [("NO", None), ("MULTI_GPU", None), ("FSDP", None), ("DEEPSPEED", 2)])
def test_engines_that_serve_roles_are_taken(kind, stage):
    check_engine(accelerator(kind, stage), nn.Linear(2, 2), "adamw_torch")


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (accelerator("DEEPSPEED", 3), "stage 3 .*fsdp2"),
        (accelerator("FSDP", fsdp_version=1), "fsdp_version: 2"),
        (accelerator("FSDP", state_dict_type="SHARDED_STATE_DICT"), "fsdp_state_dict_type: FULL_STATE_DICT"),
        (accelerator("FSDP", activation_checkpointing=True), "gradient_checkpointing: true"),
        (accelerator("FSDP", cpu_ram_efficient_loading=True), "Set it to false"),
    ],
)
def test_what_cannot_work_is_refused_with_what_to_set(engine, message):
    with pytest.raises(ValueError, match=message):
        check_engine(engine, nn.Linear(2, 2))


def test_fsdp_refuses_weights_and_optimizers_that_are_not_split():
    packed = nn.Linear(2, 2)
    packed.weight = nn.Parameter(torch.zeros(2, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="bnb_4bit_quant_storage"):
        check_engine(accelerator("FSDP"), packed)
    check_engine(accelerator("MULTI_GPU"), packed)
    with pytest.raises(ValueError, match="optim=adamw_torch"):
        check_engine(accelerator("FSDP"), nn.Linear(2, 2), "paged_adamw_8bit")
    with pytest.raises(ValueError, match="judging needs it whole"):
        check_engine(accelerator("FSDP"), nn.Linear(2, 2), unsplit="judging")


def test_the_same_batch_by_other_processes_is_taken():
    saved = batch_of(arguments(2, 4, 32), accelerator(processes=2))
    assert saved == {"processes": 2, "sequences_per_step": 16, "generation_batch_size": 32}
    check_same_batch(saved, arguments(4, 1, 32), accelerator(processes=4))


def test_another_batch_is_refused_with_what_to_set():
    saved = batch_of(arguments(2, 4, 32), accelerator(processes=2))
    with pytest.raises(ValueError, match="per_device_train_batch_size=2, gradient_accumulation_steps=2, steps_per_gen"):
        check_same_batch(saved, arguments(2, 4, 64), accelerator(processes=4))
    with pytest.raises(ValueError, match="cannot be shared out over 3 processes"):
        check_same_batch(saved, arguments(2, 4, 48), accelerator(processes=3))
    with pytest.raises(ValueError, match="Launch with 2 processes"):
        check_same_batch(saved, arguments(1, 4, 32), accelerator("DEEPSPEED", 2, processes=4))


def write_checkpoint(folder, files):
    """A whole checkpoint of an engine: real adapter files, and what the engine keeps beside them."""
    folder.mkdir()
    save_file({"w": torch.ones(2)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "global_step2").mkdir()
    for name in [*files, "rng_state_0.pth", "rng_state_1.pth"]:
        torch.save({}, folder / name)
    state = {"stateful_callbacks": {"EngineCallback": {"attributes": {"processes": 2, "sequences_per_step": 4}}}}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return str(folder)


def test_a_run_resumes_under_the_engine_that_wrote_the_checkpoint(tmp_path):
    split = write_checkpoint(tmp_path / "checkpoint-2", ["optimizer.bin", "pytorch_model_fsdp.bin", "scheduler.pt"])
    args = arguments(2, 1, output_dir=str(tmp_path))
    fsdp, parallel = accelerator("FSDP", processes=2), accelerator("MULTI_GPU", processes=2)
    assert resume_from(split, args, fsdp) == resume_from(True, args, fsdp) == split
    assert resume_from(None, args, fsdp) is None
    for given in (split, True):
        with pytest.raises(ValueError, match=r"written under FSDP2\. Launch with that"):
            resume_from(given, args, parallel)
    with pytest.raises(ValueError, match="Set per_device_train_batch_size=1, gradient_accumulation_steps=1"):
        resume_from(split, args, accelerator("FSDP", processes=4))
    whole = write_checkpoint(tmp_path / "checkpoint-3", ["optimizer.pt", "scheduler.pt"])
    assert resume_from(True, args, parallel) == whole
    with pytest.raises(ValueError, match=r"written under data parallelism\. Launch with that"):
        resume_from(whole, args, fsdp)
    (tmp_path / "checkpoint-3" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"optimizer\.pt is missing"):
        resume_from(whole, args, parallel)


@pytest.mark.parametrize("kind", ["FSDP", "MULTI_GPU", "DEEPSPEED"])
def test_a_checkpoint_that_was_cut_before_its_optimizer_is_skipped(tmp_path, kind, caplog):
    files = {"FSDP": ["optimizer.bin", "pytorch_model_fsdp.bin", "scheduler.pt"]}.get(
        kind, ["optimizer.pt", "scheduler.pt"]
    )
    if kind == "DEEPSPEED":
        files = [f"global_step2/zero_pp_rank_{rank}_optim_states.pt" for rank in (0, 1)]
    whole = write_checkpoint(tmp_path / "checkpoint-2", files)
    write_checkpoint(tmp_path / "checkpoint-4", [])
    args, engine = (
        arguments(2, 1, output_dir=str(tmp_path)),
        accelerator(kind, 2 if kind == "DEEPSPEED" else 0, processes=2),
    )
    assert resume_from(True, args, engine) == whole
    assert "checkpoint-4: " in caplog.text
    with pytest.raises(ValueError, match="is missing"):
        resume_from(str(tmp_path / "checkpoint-4"), args, engine)


def test_a_role_that_waits_is_stepped_as_if_for_the_first_time():
    left, right = (nn.Parameter(torch.ones(3)) for _ in range(2))
    groups = [
        {"params": [parameter], "role": role, "weight_decay": 0.1}
        for parameter, role in ((left, "policy"), (right, "critic"))
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    fresh = nn.Parameter(torch.ones(3))
    alone = torch.optim.AdamW([fresh], lr=0.1, weight_decay=0.1)
    for step in range(4):
        waits, waited = step < 3, 0 < step < 4
        left.grad, right.grad = torch.zeros(3) if waits else torch.full((3,), 2.0), torch.ones(3)
        keep_untrained(SimpleNamespace(optimizer=optimizer), "policy", waits, waited)
        optimizer.step()
        assert torch.equal(left, torch.ones(3)) == waits
    fresh.grad = torch.full((3,), 2.0)
    alone.step()
    assert torch.equal(left, fresh)
    assert optimizer.state[right]["step"] == 4


def test_without_sharding_nothing_changes():
    layer, parts = nn.Linear(2, 2), [object()]
    assert same_number_of_passes(layer, parts) is parts
    assert with_weights(layer, lambda x: x + 1, torch.tensor(1)) == 2
    tensor = torch.tensor([3.0, 4.0])
    assert whole(tensor) is tensor
    assert shared_out(tensor, tensor) is tensor
    assert total_norm([tensor, torch.tensor([12.0])]) == 13


def test_accelerate_reads_the_configurations_and_the_trainers_take_them(repo_root):
    files = sorted((repo_root / "trl_ext" / "configs" / "accelerate").glob("*.yaml"))
    assert {path.stem for path in files} == {f"{e}_{n}" for e in ("ddp", "fsdp2", "zero2") for n in ("2", "8", "2x8")}
    for path in files:
        config = load_config_from_file(str(path))
        machines, cards = (2, 16) if path.stem.endswith("2x8") else (1, int(path.stem[-1]))
        assert (config.num_machines, config.num_processes) == (machines, cards)
        assert f"--config_file {path.stem} " in path.read_text()
        options = {}
        if path.stem.startswith("fsdp2"):
            names = {name.removeprefix("fsdp_") if name != "fsdp_version" else name for name in config.fsdp_config}
            options = {n: config.fsdp_config[n if n == "fsdp_version" else f"fsdp_{n}"] for n in names}
        stage = config.deepspeed_config.get("zero_stage")
        check_engine(accelerator(config.distributed_type.value, stage, **options), nn.Linear(2, 2))
