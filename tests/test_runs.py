"""The guards: what passes, and what the error says."""

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from trl_ext.runs import check_finite, check_first_kl, check_not_sharded


def terms(**values):
    return {name: torch.tensor(value) for name, value in values.items()}


def test_finite_terms_pass(tmp_path):
    check_finite("loss", terms(rank_loss=1.0, sft_loss=-3e38), 0, str(tmp_path))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_named_with_its_step_and_the_last_checkpoint(tmp_path, value):
    bad = terms(rank_loss=1.0, sft_loss=value)
    with pytest.raises(RuntimeError, match=rf"^non-finite loss at step 7: {{'sft_loss': {value}}}.*no checkpoint yet"):
        check_finite("loss", bad, 7, str(tmp_path))
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(RuntimeError, match=r"non-finite gradient norm at step 8: .*checkpoint is .*checkpoint-4\."):
        check_finite("gradient norm", bad, 8, str(tmp_path))


def test_the_first_kl_is_zero_or_an_error():
    logps = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    check_first_kl(logps, torch.tensor([[-1.0, -2.0]]))
    with pytest.raises(RuntimeError, match=r"differ from the reference's by up to 0\.5: "):
        check_first_kl(logps, torch.tensor([[-1.0, -1.5]]))


@pytest.mark.parametrize(
    ("kind", "stage", "refused"),
    [("NO", None, 0), ("MULTI_GPU", None, 0), ("FSDP", None, 1), ("DEEPSPEED", 2, 0), ("DEEPSPEED", 3, 1)],
)
def test_a_base_split_over_processes_is_refused(kind, stage, refused):
    plugin = None if stage is None else SimpleNamespace(zero_stage=stage)
    accelerator = SimpleNamespace(
        distributed_type=DistributedType(kind), state=SimpleNamespace(deepspeed_plugin=plugin)
    )
    if refused:
        with pytest.raises(ValueError, match="multi_gpu"):
            check_not_sharded(accelerator)
    else:
        check_not_sharded(accelerator)
