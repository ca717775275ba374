"""What happened, as it happened: one line of JSON each, appended and kept, so that a run that ends badly can be read too."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO


class History:
    """Appends to a file. `record` costs some microseconds; every line is in the kernel's hands when it returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO = path.open("a", buffering=1)

    def record(self, event: str, **values: Any) -> None:
        """One line: wall time (seconds since the epoch), monotonic time, what it is, and its values."""
        line = {"at": round(time.time(), 4), "clock": round(time.monotonic(), 4), "event": event, **values}
        self._file.write(json.dumps(line, default=str) + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
