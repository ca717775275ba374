"""A git repository with a hard life, made by `git fast-import` in a fraction of a second; the same one for the same seed."""

from __future__ import annotations

import random
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

FILE, SCRIPT, LINK = "100644", "100755", "120000"

NAMES = [
    b"README",
    b"a name with spaces ",
    b" leading",
    b"-rf",
    b":0:index",
    b"#hash",
    b"100% sure",
    b"%25",
    b"R100",
    b"commit 0000",
    b'"quoted"',
    b"it's; rm",
    b"back\\slash",
    b"tab\there",
    b"line\nbreak",
    b"null\xe2\x90\x80",
    b"\x01\x7f",
    "Z\u00fcrich.md".encode(),
    "Zu\u0308rich.md".encode(),  # decomposed: another name
    "日本語/ファイル".encode(),
    "שלום".encode(),
    "🦉".encode(),
    b"latin-\xe9",  # not UTF-8
    b"\xff\xfe",
    b"deep/" * 20 + b"end",
    b"l" * 255,
    b"src/a.py",
    b"src/b.py",
    b"src",  # a folder at other times
    b"docs/index",
    b"docs/index/html",  # docs/index is a folder at other times
    *(b"src/file %d.py" % n for n in range(60)),
]


@dataclass
class OddRepository:
    """Random commits on `main`: each adds, edits, renames, deletes; some merge a side branch, some do nothing."""

    dice: random.Random
    files: dict[bytes, tuple[str, bytes]] = field(default_factory=dict)  # path -> mode, content
    gone: list[bytes] = field(default_factory=list)
    script: list[bytes] = field(default_factory=list)
    marks: int = 0

    def grow(self, commits: int) -> None:
        """Write so many commits on main, and as many on side branches as it takes."""
        previous = 0
        for number in range(commits):
            if number % 20 == 19:
                change = self._keep(b"from the side", FILE, b"%d" % number)
                side = self._commit(
                    b"side", previous, 0, [change]
                )  # first-parent history does not see it, only its merge
                previous = self._commit(b"main", previous, side, [change, *self._changes(2)])
            else:
                previous = self._commit(b"main", previous, 0, self._changes(self.dice.choice([0, 1, 1, 2, 3, 5, 8])))

    def _commit(self, branch: bytes, parent: int, merged: int, changes: list[bytes]) -> int:
        self.marks += 1
        self.script += [b"commit refs/heads/" + branch, b"mark :%d" % self.marks]
        self.script += [b"committer Nobody <nobody@example.org> %d +0000" % (1_700_000_000 + self.marks), b"data 0"]
        self.script += [b"from :%d" % parent] if parent else []
        self.script += [b"merge :%d" % merged] if merged else []
        self.script += changes
        return self.marks

    def _changes(self, count: int) -> list[bytes]:
        return [line for _ in range(count) for line in self._change()]

    def _change(self) -> list[bytes]:
        kind = self.dice.choice(["add", "add", "add", "edit", "edit", "edit", "rename", "move", "delete", "type"])
        if kind == "add" or not self.files:
            return self._add(
                self.dice.choice(self.gone) if self.gone and self.dice.random() < 0.3 else self.dice.choice(NAMES)
            )
        path = self.dice.choice(sorted(self.files))
        mode, content = self.files[path]
        if kind == "edit":
            return [self._keep(path, mode, content + b"%d\n" % self.marks)]
        if kind == "type":
            return [self._keep(path, {FILE: SCRIPT, SCRIPT: LINK, LINK: FILE}[mode], content)]
        self.gone.append(path)
        del self.files[path]
        gone = [b"D " + quoted(path)]
        if kind == "delete":
            return gone
        content += b"edited on the way\n" if kind == "move" else b""
        return gone + self._add(self.dice.choice(NAMES), mode, content)

    def _add(self, path: bytes, mode: str = FILE, content: bytes | None = None) -> list[bytes]:
        """Add a file; whatever is in its way, as a file or as a folder, goes."""
        gone = [p for p in self.files if p.startswith(path + b"/") or path.startswith(p + b"/")]
        for blocking in gone:
            del self.files[blocking]
        body = content if content is not None else b"".join(b"%d\n" % self.dice.randrange(10**6) for _ in range(20))
        return [*(b"D " + quoted(p) for p in gone), self._keep(path, mode, body)]

    def _keep(self, path: bytes, mode: str, content: bytes) -> bytes:
        self.files[path] = (mode, content)
        return b"M %b inline %b\ndata %d\n%b" % (mode.encode(), quoted(path), len(content), content)


def quoted(path: bytes) -> bytes:
    """A path as fast-import reads it, whatever bytes are in it."""
    return (
        b'"'
        + b"".join(b"%c" % byte if chr(byte).isalnum() and byte < 128 else b"\\%03o" % byte for byte in path)
        + b'"'
    )


def make_odd_repository(folder: Path, *, commits: int, seed: int = 1) -> Path:
    """Make it in a new bare repository, whose HEAD is main."""
    odd = OddRepository(random.Random(seed))
    odd.grow(commits)
    subprocess.run(["git", "init", "--quiet", "--bare", "--initial-branch=main", str(folder)], check=True)
    script = b"\n".join(odd.script) + b"\n"
    subprocess.run(["git", "-C", str(folder), "fast-import", "--quiet"], input=script, check=True)
    return folder
