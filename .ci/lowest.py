"""Prints the lowest versions that setup.py and the extras train and web allow, as constraints for pip."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def lowest() -> list[str]:
    """Requirements such as Pillow==11, of all that have a floor."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    policy = (ROOT / "setup.py").read_text(encoding="utf-8")
    (torch,) = re.findall(r'^LEAST_TORCH = "(.+)"$', policy, re.MULTILINE)
    (required,) = re.findall(r"install_requires=\[torch_requirement, (.+)\]", policy)
    found = [f"torch>={torch}", *re.findall(r'"(.+?)"', required), *extras["train"], *extras["web"]]
    return [requirement.replace(">=", "==") for requirement in found if ">=" in requirement]


if __name__ == "__main__":
    print("\n".join(lowest()))
