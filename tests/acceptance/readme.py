"""The README as data: its code blocks, and the parts of it that are generated.

`python -m tests.acceptance.readme` writes the generated parts again.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

from pydantic import SecretStr

from relay.settings import walk_settings

README = Path(__file__).parents[2] / "README.md"


def blocks(language: str, heading: str) -> list[str]:
    """The code blocks of one language below one heading."""
    section = README.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def settings_table() -> str:
    """The table of all settings, from their definitions."""
    lines = ["| setting | default | |", "|---|---|---|"]
    lines += [
        f"| `{name}` | {_default(info.default)} | {_escaped(info.description)}{_choices(info)} |"
        for name, info in walk_settings()
    ]
    return "\n".join(lines)


def generated(part: str) -> str:
    """What stands between the marks of a generated part."""
    return README.read_text(encoding="utf-8").split(f"<!-- {part} -->\n")[1].split(f"\n<!-- /{part} -->")[0]


def write_settings() -> None:
    """Bring the settings table up to date."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split("<!-- settings -->\n")
    after = rest.split("<!-- /settings -->")[1]
    README.write_text(f"{before}<!-- settings -->\n{settings_table()}\n<!-- /settings -->{after}", encoding="utf-8")


def _default(value: Any) -> str:
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    match value:
        case None:
            return "–"
        case bool():
            return f"`{str(value).lower()}`"
        case float() if value == int(value):
            return f"`{int(value)}`"
        case tuple():
            return f"`{', '.join(value)}`"
        case _:
            return f"`{value}`" if isinstance(value, str | int | float) else "–"


def _choices(info: Any) -> str:
    choices = [c for c in get_args(info.annotation) if isinstance(c, str)]
    return f" ({', '.join(choices)})" if choices and not all(c in (info.description or "") for c in choices) else ""


def _escaped(text: str | None) -> str:
    return (text or "").replace("|", "\\|")


if __name__ == "__main__":
    write_settings()
