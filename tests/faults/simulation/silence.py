"""A log for simulations: nothing is written, which is most of what logging costs."""

from __future__ import annotations

from typing import Any


class Silence:
    """Stands for relay's loggers."""

    def bind(self, **_: Any) -> Silence:
        return self

    def debug(self, *_: Any, **__: Any) -> None:
        """Nothing; so the others."""

    info = warning = error = debug


SILENCE: Any = Silence()
