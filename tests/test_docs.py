"""README and docs say what the code does: commands, paths, public names, options, metrics."""

import ast
import dataclasses
import re
from pathlib import Path

import trl_ext
from trl_ext import PPOMaxConfig


def documents(root: Path) -> list[Path]:
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def test_the_public_names_are_those_of_the_api_page(repo_root: Path) -> None:
    documented = re.findall(r"^\| `(\w+)` \|", (repo_root / "docs" / "api.md").read_text(), flags=re.M)
    assert sorted(documented) == sorted(trl_ext.__all__)
    for name in trl_ext.__all__:
        assert getattr(trl_ext, name).__doc__


def test_local_links_lead_somewhere(repo_root: Path) -> None:
    for page in documents(repo_root):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_commands_name_files_that_exist(repo_root: Path) -> None:
    for page in documents(repo_root):
        for path in re.findall(r"(?:recipes|tests|docs|trl_ext)/[\w/.]+\.(?:py|yaml|md|png)", page.read_text()):
            assert (repo_root / path).exists(), f"{page.name}: {path}"


def test_the_readme_gives_the_two_commands_and_ci_runs_the_second(repo_root: Path) -> None:
    readme = (repo_root / "README.md").read_text()
    assert "pip install -e . -c constraints.txt && trl-ext ppo-max" in readme
    assert "accelerate launch recipes/ppo_max.py" in readme
    assert 'pip install -e ".[test]" -c constraints.txt && pytest' in readme
    assert re.search(r"^[^#\n]*\bpytest\b", (repo_root / ".ci" / "run").read_text(), flags=re.M)


def test_every_option_of_ours_is_documented(repo_root: Path) -> None:
    from trl import RLOOConfig

    ours = {f.name for f in dataclasses.fields(PPOMaxConfig)} - {f.name for f in dataclasses.fields(RLOOConfig)}
    page = (repo_root / "docs" / "ppo_max.md").read_text()
    undocumented = {name for name in ours if f"`{name}`" not in page} - {"ptx_max_length"}
    assert undocumented == set()


def test_the_file_map_names_what_exists(repo_root: Path) -> None:
    readme = (repo_root / "README.md").read_text()
    block = readme.split("## What is where")[1].split("```")[1]
    for line in block.strip().splitlines():
        name = line.split()[0]
        inside = repo_root / "trl_ext" / name if line.startswith("  ") else repo_root / name
        assert inside.exists(), line


def test_every_option_of_rrhf_is_documented(repo_root: Path) -> None:
    from transformers import TrainingArguments

    from trl_ext import RRHFConfig

    ours = {f.name for f in dataclasses.fields(RRHFConfig)} - {f.name for f in dataclasses.fields(TrainingArguments)}
    page = (repo_root / "docs" / "rrhf.md").read_text()
    assert {name for name in ours if f"`{name}`" not in page} == set()


def test_what_may_change_when_a_run_is_resumed_is_documented_and_nothing_else(repo_root: Path) -> None:
    from trl_ext.run_identity import MAY_CHANGE

    page = (repo_root / "docs" / "resuming.md").read_text().split("What may change (")[1]
    rows = dict(re.findall(r"^\| ([a-z ]+) \| (`.*) \|$", page, flags=re.M))
    assert {group: tuple(re.findall(r"`(\w+)`", row)) for group, row in rows.items()} == MAY_CHANGE


def definitions(path: Path) -> set[str]:
    """Functions and classes of a file, and methods as `Class.method`."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


def test_papers_and_details_name_functions_and_tests_that_there_are(repo_root: Path) -> None:
    page = (repo_root / "docs" / "papers.md").read_text()
    named = re.findall(r"`([\w/]+\.py): ([\w.]+)`", page)
    assert len(named) > 50
    for file, name in named:
        folder = "tests" if Path(file).name.startswith("test_") else "trl_ext"
        assert name in definitions(repo_root / folder / file), f"{folder}/{file}: {name}"
    for file in re.findall(r"`([\w/]+(?:\.py|/))`", page):
        assert (repo_root / "trl_ext" / file).exists(), file
    details = re.findall(r"^\| (\d+) \| .+ \| `[\w/]+\.py: [\w.]+` \| `[\w/]+\.py: test_\w+` \|$", page, flags=re.M)
    assert [int(number) for number in details] == list(range(1, len(details) + 1))
    assert len(details) >= 24


def messages(root: Path) -> str:
    """What the package may say, each placeholder as a blank."""
    found = []
    for path in (root / "trl_ext").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else " " for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_errors_of_the_troubleshooting_page_are_ours(repo_root: Path) -> None:
    page = (repo_root / "docs" / "troubleshooting.md").read_text()
    tables = re.findall(r"^\| the error says \|.*\n\| ---.*\n((?:\|.*\n)+)", page, flags=re.M)
    said = [
        text for table in tables for row in table.splitlines() for text in re.findall(r"`([^`]+)`", row.split(" | ")[0])
    ]
    assert len(said) >= 20
    ours = messages(repo_root)
    assert [text for text in said if text not in ours] == []


def anchors(page: str) -> set[str]:
    """Of the headings, as the site and GitHub make them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page, flags=re.M | re.S), flags=re.M)
    plain = [
        re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)).strip().lower() for title in titles
    ]
    return {title.replace(" ", "-") for title in plain}


def test_links_to_a_part_of_a_page_find_it(repo_root: Path) -> None:
    for page in documents(repo_root):
        for link, part in re.findall(r"\]\((?!https?:)([^)#]*\.md)?#([^)]+)\)", page.read_text()):
            target = page.parent / link if link else page
            assert part in anchors(target.read_text()), f"{page.name}: {link}#{part}"


def test_every_question_has_an_answer_on_a_page(repo_root: Path) -> None:
    page = (repo_root / "docs" / "questions.md").read_text()
    rows = re.findall(r"^\| ([^|]+\?[^|]*|[^|]+\.) \| ([^|]+) \| ([^|]+) \|$", page, flags=re.M)
    assert len(rows) >= 20
    for question, answer, asked in rows:
        assert re.search(r"\]\((\w+\.md)?(#[\w-]+)?\)", answer), question
        assert "](https://github.com/" in asked, question
