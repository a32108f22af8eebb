"""RRHFConfig: defaults, and what it refuses."""

import pytest
from trl import TrlParser

from trl_ext.rrhf import RRHFConfig


def make(tmp_path, **options):
    return RRHFConfig(str(tmp_path), **({"report_to": "none", "use_cpu": True} | options))


def test_defaults_are_the_papers_loss_offline(tmp_path):
    args = make(tmp_path)
    assert (args.rank_coef, args.sft_coef, args.length_penalty, args.margin, args.beta) == (1, 1, 1, 0, 0)
    assert not args.sft_token_mean
    assert not args.online
    assert args.share_prompts
    assert args.logging_steps == 10
    assert args.remove_unused_columns is False


def test_every_field_of_its_own_has_help():
    inherited = set(RRHFConfig.__mro__[1].__dataclass_fields__)
    own = {name: field for name, field in RRHFConfig.__dataclass_fields__.items() if name not in inherited}
    assert len(own) >= 18
    assert all(field.metadata.get("help") for field in own.values())


def test_options_are_flags(tmp_path):
    parser = TrlParser((RRHFConfig,))
    flags = "--beta 0.1 --online_every_steps 4 --sft_token_mean true --reward_weights 1 0.5 --max_length 64 --use_cpu"
    (args,) = parser.parse_args_and_config(["--output_dir", str(tmp_path), *flags.split()])
    assert (args.beta, args.online_every_steps, args.sft_token_mean, args.max_length) == (0.1, 4, True, 64)
    assert args.reward_weights == [1.0, 0.5]
    assert args.online
    assert parser.format_help()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_coef": -1}, "rank_coef=-1 must be a number of at least 0"),
        ({"margin": float("nan")}, "margin=nan"),
        ({"beta": "0.1"}, "beta='0.1'"),
        ({"rank_coef": 0, "sft_coef": 0}, "leave nothing to learn"),
        ({"max_length": 1}, "max_length=1 must be a whole number of at least 2"),
        ({"max_length": 10.5}, "max_length=10.5"),
        ({"num_online_responses": 1}, "num_online_responses=1 must be a whole number of at least 2"),
        ({"online_every_steps": 0}, "online_every_steps=0"),
        ({"generation_batch_size": 0}, "generation_batch_size=0"),
        ({"temperature": 0}, "temperature=0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        (
            {"reward_weights": [1.0, float("inf")]},
            r"reward_weights=\[1.0, inf\] must be a list of .* finite number",
        ),
        ({"online_every_steps": 2, "online_every_pass": True}, "two variants: set one"),
        ({"online_keep_best": True}, "set online_every_steps or online_every_pass"),
        ({"remove_unused_columns": True}, "set it to False"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "wrong role"),
    ],
)
def test_errors_name_the_field_the_value_and_the_fix(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **options)
