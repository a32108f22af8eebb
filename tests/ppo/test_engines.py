"""PPO-Max on two real processes (gloo) under accelerate's engines: the run of one process on the whole batch."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM

from tests.ppo import tiny
from tests.ppo.under_engines import ENVIRONMENT, HELD, UPDATES, four_bit, run, updated

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ENGINES = ["ddp", "fsdp2", "zero2"]
WRAPPERS = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPSharedBaseModel", "zero2": "DeepSpeedEngine"}


@pytest.fixture(scope="module", params=ENGINES)
def engine(request):
    if request.param == "zero2" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory, engine):
    return tmp_path_factory.mktemp(engine)


@pytest.fixture(scope="module")
def ranks(world, folder, repo_root, engine):
    """What under_engines.py found out on each of two processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = str(Path(__file__).parent / "under_engines.py")
    environment = tiny.environment(repo_root)
    del environment["ACCELERATE_USE_CPU"]
    process = subprocess.run(
        [*launch, script, str(world), str(folder), engine],
        cwd=repo_root,
        env=environment | ENVIRONMENT[engine],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr[-8000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def close(left, right, tolerance=1e-5):
    for role, weights in left.items():
        for name, weight in weights.items():
            torch.testing.assert_close(right[role][name], weight, rtol=tolerance, atol=tolerance, msg=f"{role} {name}")


@pytest.fixture(scope="module")
def one_process(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    found = {name: updated(world, folder / name, 1, **settings) for name, settings in UPDATES.items()}
    settings = UPDATES["checkpointed"] | {"optim": "adamw_torch"}
    found["held"] = updated(world, folder / "held", 1, **HELD)
    return found | {"4 bits": updated(world, folder / "4 bits", 1, model=four_bit(world), **settings)}


def test_five_updates_give_the_adapters_of_one_process_on_the_whole_batch(world, ranks, one_process):
    start = tiny.role_weights(tiny.four_roles(world), tiny.Role.POLICY)
    for rank in ranks:
        for name, weights in rank["updates"].items():
            close(one_process[name], weights, 1e-4 if name == "4 bits" else 1e-5)
            assert not tiny.same(start, weights["policy"])


def test_the_model_is_wrapped_and_both_processes_end_alike(ranks, engine):
    assert [rank["wrapped"] for rank in ranks] == [WRAPPERS[engine]] * 2
    for role, weights in ranks[0]["end"].items():
        assert tiny.same(weights, ranks[1]["end"][role]), role


def test_a_resumed_run_ends_as_if_it_had_never_stopped(ranks):
    for role, weights in ranks[0]["end"].items():
        assert tiny.same(weights, ranks[0]["resumed"][role]), role


def test_what_is_saved_is_whole_and_loads_without_the_engine(ranks, folder):
    saved = AutoPeftModelForCausalLM.from_pretrained(folder / "run" / "final")
    names = {name.replace(".default", ""): weight for name, weight in saved.named_parameters() if "lora_" in name}
    assert names.keys() == ranks[0]["end"]["policy"].keys()
    assert all(torch.equal(names[name], weight) for name, weight in ranks[0]["end"]["policy"].items())


def test_a_checkpoint_goes_on_with_another_number_of_processes_in_the_same_batch(world, ranks, folder, engine):
    checkpoint = str(folder / "run" / "checkpoint-4")
    if engine != "ddp":
        with pytest.raises(ValueError, match="Launch with that"):
            run(world, folder / "one", resume=checkpoint)
        return
    with pytest.raises(ValueError, match=r"2 processes.*Set per_device_train_batch_size=2, gradient_accumulation_st"):
        run(world, folder / "other", resume=checkpoint)
    weights, _ = run(world, folder / "one", resume=checkpoint, per_device_train_batch_size=4)
    assert not tiny.same(weights["policy"], ranks[0]["end"]["policy"])  # it samples other completions
