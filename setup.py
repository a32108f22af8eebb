"""What pyproject.toml cannot hold: the README as a package page shows it, and the addresses of the repository.

The one place for the repository's address is `repository` under `[tool.trl_ext]` in pyproject.toml. Relative links of
README.md become links into it; while it is empty they become plain text, because a package page resolves none.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)]+)\)")
PAPERS = {
    "TRL": "https://github.com/huggingface/trl",
    "Paper: PPO-Max": "https://arxiv.org/abs/2307.04964",
    "Paper: RRHF": "https://arxiv.org/abs/2304.05302",
}


def repository() -> str:
    """The address from pyproject.toml, without a slash at its end; "" where it is not known."""
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    return tools["trl_ext"]["repository"].rstrip("/")


def package_page(readme: str, address: str) -> str:
    """README.md with its relative links leading into the repository, or, without an address, as plain text."""

    def absolute(match: re.Match[str]) -> str:
        picture, text, path = match.groups()
        if not address:
            return "" if picture else text
        return f"{picture}[{text}]({address}/{'raw' if picture else 'blob'}/main/{path})"

    return LINK.sub(absolute, readme)


def urls(address: str) -> dict[str, str]:
    """Those that a package page lists."""
    if not address:
        return PAPERS
    own = {"Repository": address, "Issues": f"{address}/issues", "Changes": f"{address}/blob/main/CHANGELOG.md"}
    return own | PAPERS


if __name__ == "__main__":
    setup(
        long_description=package_page((ROOT / "README.md").read_text(encoding="utf-8"), repository()),
        long_description_content_type="text/markdown",
        project_urls=urls(repository()),
    )
