"""Which rows an operator means: what a selection says of itself, before any database is asked."""

from __future__ import annotations

import fnmatch
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import ConfigError
from relay.operate.selection import Selection, aggregate_text, like


class TestBounds:
    def test_nothing_selected_is_refused_and_says_how_to_select(self) -> None:
        with pytest.raises(
            ConfigError, match=r"nothing is selected: name an aggregate \(order/42\) or a filter, or say --all"
        ):
            Selection().require_bounds()

    @pytest.mark.parametrize(
        "one",
        [
            {"aggregate": "order/42"},
            {"aggregate_type": "order"},
            {"event_type": "Paid"},
            {"cause": "nacked"},
            {"state": "stuck"},
            {"error": "timeout"},
            {"older_than_s": 60.0},
            {"since": datetime(2026, 1, 1, tzinfo=UTC)},
            {"until": datetime(2026, 1, 1, tzinfo=UTC)},
            {"from_seq": 2},
            {"to_seq": 1},
            {"ids": (1,)},
            {"source": "shop"},
        ],
        ids=lambda one: next(iter(one)),
    )
    def test_each_filter_bounds_and_excludes_all(self, one: dict[str, object]) -> None:
        Selection(**one).require_bounds()  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="--all means everything"):
            Selection(**one, everything=True).require_bounds()  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("one", "named"),
        [
            ({"aggregate": "*/*"}, r"\*/\*"),
            ({"aggregate": "**/*"}, r"\*/\*"),
            ({"error": ""}, "an empty error"),
            ({"from_seq": 1}, "seq from 1"),
            ({"from_seq": 0}, "seq from 1"),
            ({"older_than_s": 0.0}, "older than 0 s"),
            ({"aggregate": "*/*", "error": "", "consumer": "billing"}, r"\*/\*, an empty error"),
        ],
    )
    def test_a_filter_that_excludes_nothing_is_no_bound(self, one: dict[str, object], named: str) -> None:
        with pytest.raises(ConfigError, match=rf"what is given \({named}\) excludes nothing: .*or say --all"):
            Selection(**one).require_bounds()  # type: ignore[arg-type]
        Selection(**one, everything=True).require_bounds()  # type: ignore[arg-type]
        Selection(**one, cause="nacked").require_bounds()  # type: ignore[arg-type]

    @pytest.mark.parametrize("aggregate", ["order/*", "*/42", r"\*/*", r"*/\*", "*/**1"])
    def test_a_pattern_that_excludes_something_is_one(self, aggregate: str) -> None:
        Selection(aggregate=aggregate).require_bounds()

    def test_all_is_enough(self) -> None:
        Selection(everything=True).require_bounds()

    def test_a_consumer_alone_is_the_whole_of_an_inbox(self) -> None:
        with pytest.raises(ConfigError):
            Selection(consumer="billing").require_bounds()
        Selection(consumer="billing", everything=True).require_bounds()


class TestAnAggregate:
    @pytest.mark.parametrize("text", ["", "order", "/42", "order/", "/"])
    def test_needs_a_type_and_an_id(self, text: str) -> None:
        for ask in (Selection.parts, Selection.exact):
            with pytest.raises(ConfigError, match="does not name an aggregate: expected TYPE/ID"):
                ask(Selection(aggregate=text))

    def test_the_first_slash_divides(self) -> None:
        assert Selection(aggregate="order/a/b/").exact() == ("order", "a/b/")

    def test_an_asterisk_stands_for_any_characters_and_then_it_is_no_single_aggregate(self) -> None:
        selection = Selection(aggregate="ord*/4_2*")
        assert selection.parts() == ("ord%", r"4\_2%")
        assert selection.exact() is None

    def test_an_asterisk_after_a_backslash_is_itself(self) -> None:
        selection = Selection(aggregate=r"order/4\*2")
        assert selection.exact() == ("order", "4*2")
        assert selection.parts() == ("order", "4*2")

    @given(
        st.from_regex(r"[A-Za-z0-9_.:-]{1,20}", fullmatch=True),
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1),
    )
    def test_its_text_selects_exactly_itself(self, kind: str, name: str) -> None:
        selection = Selection(aggregate=aggregate_text(kind, name))
        assert selection.exact() == (kind, name)
        assert selection.parts() == (like(kind), like(name))

    @given(
        st.lists(st.sampled_from(["a", "%", "_", "\\", "*"]), min_size=1).map("".join), st.text("ab%_\\", max_size=6)
    )
    def test_as_a_pattern_it_matches_what_a_shell_would(self, pattern: str, name: str) -> None:
        if "\\*" in pattern:
            return
        parts = Selection(aggregate=f"t/{pattern}").parts()
        assert parts is not None
        shell = "".join("[*]" if c == "[" else c for c in pattern)
        assert _like(parts[1], name) == fnmatch.fnmatchcase(name, shell)


@pytest.mark.parametrize("field", ["aggregate", "aggregate_type", "event_type", "error", "source", "consumer"])
@pytest.mark.parametrize("text", ["order/\0", "order/\udcff"], ids=["NUL", "not UTF-8"])
def test_what_no_row_can_contain_is_refused(field: str, text: str) -> None:
    with pytest.raises(ConfigError, match="is not a text: it contains NUL, or is not UTF-8"):
        Selection(**{field: text})  # type: ignore[arg-type]


def test_the_record_tells_what_was_asked_for_and_nothing_else() -> None:
    moment = datetime(2026, 3, 1, 3, tzinfo=UTC)
    assert Selection(aggregate="order/4*", since=moment, ids=(1, 2)).as_json() == {
        "aggregate": "order/4*",
        "since": "2026-03-01T03:00:00+00:00",
        "ids": (1, 2),
    }
    assert Selection(everything=True, consumer="billing").as_json() == {"all": True, "consumer": "billing"}


def _like(pattern: str, text: str) -> bool:
    """PostgreSQL's LIKE, for patterns of our own making."""
    if not pattern:
        return not text
    if pattern[0] == "%":
        return any(_like(pattern[1:], text[i:]) for i in range(len(text) + 1))
    if pattern[0] == "\\":
        pattern = pattern[1:]
    elif pattern[0] == "_":
        return bool(text) and _like(pattern[1:], text[1:])
    return bool(text) and text[0] == pattern[0] and _like(pattern[1:], text[1:])
