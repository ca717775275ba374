"""The README's console blocks, read as a script."""

from __future__ import annotations

import pytest

from tests.acceptance.console import Step, steps

BLOCK = "$ relay status   # one look\nbacklog  …\nheld  3\n\n$ relay stuck\n…\n"


def test_a_block_is_its_commands_and_what_is_shown_of_their_answers() -> None:
    assert steps(BLOCK) == [Step("relay status", ("backlog  …", "held  3")), Step("relay stuck", ())]


def test_shown_lines_are_looked_for_in_order_whatever_the_space_between_words() -> None:
    (step, _) = steps(BLOCK)
    assert step.missing("x\n  backlog 17 rows\nother\nheld     3 ") == []
    assert step.missing("held 3\nbacklog 17") == ["held  3"]
    assert step.missing("backlog 17") == ["held  3"]


def test_an_answer_needs_a_command() -> None:
    with pytest.raises(ValueError, match="without a command"):
        steps("backlog 3\n")
