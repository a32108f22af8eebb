"""Model cards: what they say of a run's options."""

from trl_ext import PPOMaxConfig
from trl_ext.report.cards import changed_options, write_card


def test_an_option_that_is_switched_off_by_null_is_named(tmp_path) -> None:
    args = PPOMaxConfig(str(tmp_path), reward_clip=None, use_cpu=True, report_to="none")
    assert changed_options(args)["reward_clip"] == "null"
    assert "reward_clip" not in changed_options(PPOMaxConfig(str(tmp_path), use_cpu=True, report_to="none"))


def test_a_card_is_the_readme_of_its_folder(tmp_path) -> None:
    write_card(tmp_path / "new", "# a card\n")
    assert (tmp_path / "new" / "README.md").read_text() == "# a card\n"
