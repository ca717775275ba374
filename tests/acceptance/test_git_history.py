"""A real input: the history of a git repository goes through relay, with faults on the way, and the files come out right."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from relay.daemon import Outbox
from relay.producer.asyncpg import emit_many
from relay.sandbox import RabbitMQ
from relay.settings import Settings
from tests.acceptance import git_files
from tests.acceptance.consumers import UNBOUND, consuming
from tests.acceptance.crooked import crooked_way
from tests.acceptance.git_history import Commit, commits, tree
from tests.acceptance.odd_repository import make_odd_repository
from tests.acceptance.wire import wire
from tests.harness.outbox import RelayProcess, connected, settings_for

PROJECT = Path(__file__).parents[2]
ODD_COMMITS = 240


@dataclass(frozen=True)
class History:
    """A repository at one commit: other people may commit to it while a test runs."""

    repository: Path
    head: str

    @property
    def commits(self) -> list[Commit]:
        return commits(self.repository, self.head)

    @property
    def files(self) -> dict[str, str]:
        return tree(self.repository, self.head)

    @property
    def stories(self) -> dict[str, list[tuple[int, str, str]]]:
        """What each path lives through: number, event type, commit."""
        found: dict[str, list[tuple[int, str, str]]] = defaultdict(list)
        for commit in self.commits:
            for event in commit.events:
                story = found[event.aggregate_id or ""]
                story.append((len(story) + 1, event.event_type, commit.id))
        return dict(found)


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture(autouse=True)
def _outside_of_a_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a git hook these name the repository that is being committed to, whatever folder git is told."""
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def this_repository() -> History:
    try:
        top = Path(git(PROJECT, "rev-parse", "--show-toplevel"))
        head = git(PROJECT, "rev-parse", "--verify", "HEAD")
    except FileNotFoundError:
        pytest.skip("there is no git on this machine: install it to see this project's own history go through relay")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"{PROJECT} is not a git checkout with a commit: {error.stderr.strip()}")
    if top.resolve() != PROJECT.resolve():
        pytest.skip(f"{PROJECT} is not a git checkout (an unpacked source distribution?), it only lies in one: {top}")
    return History(PROJECT, head)


@pytest.fixture
def odd_repository(tmp_path: Path) -> History:
    try:
        repository = make_odd_repository(tmp_path / "odd.git", commits=ODD_COMMITS)
    except FileNotFoundError:
        pytest.skip("there is no git on this machine: install it to see a git history go through relay")
    return History(repository, git(repository, "rev-parse", "HEAD"))


@pytest.fixture(params=["this_repository", "odd_repository"])
def history(request: pytest.FixtureRequest) -> History:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, History)
    return found


def test_each_commits_events_lead_from_its_first_parents_files_to_its_own(history: History) -> None:
    files: dict[str, str] = {}
    for commit in history.commits:
        for event in commit.events:
            path = event.aggregate_id or ""
            match event.event_type:
                case "FileAdded":
                    assert path not in files
                    files[path] = event.payload["file"]
                case "FileModified":
                    assert files[path] != event.payload["file"]
                    files[path] = event.payload["file"]
                case _:
                    del files[path]
        assert files == tree(history.repository, commit.id)


def test_a_shallow_clone_begins_with_all_files_that_its_first_commit_has(
    odd_repository: History, tmp_path: Path
) -> None:
    clone = tmp_path / "shallow"
    git(tmp_path, "clone", "--quiet", "--no-checkout", "--depth=3", f"file://{odd_repository.repository}", str(clone))
    first, *rest = commits(clone)
    assert len(rest) == 2
    assert {e.event_type for e in first.events} == {"FileAdded"}
    assert {e.aggregate_id: e.payload["file"] for e in first.events} == tree(clone, first.id)
    assert [c.events for c in rest] == [c.events for c in odd_repository.commits[-2:]]


def test_the_odd_repository_is_as_odd_as_it_should_be(odd_repository: History) -> None:
    events = [event for commit in odd_repository.commits for event in commit.events]
    assert len(odd_repository.commits) == ODD_COMMITS
    assert {e.event_type for e in events} == {"FileAdded", "FileModified", "FileRenamed", "FileDeleted"}
    assert len(odd_repository.files) > 20
    assert sum(not commit.events for commit in odd_repository.commits) > 5
    types = [[event_type for _, event_type, _ in story] for story in odd_repository.stories.values()]
    assert sum(story.count("FileAdded") > 1 for story in types) > 10, "files that come back"
    paths = odd_repository.stories.keys()
    assert {
        "latin-%E9",
        "line\nbreak",
        "Z\u00fcrich.md",
        "Zu\u0308rich.md",
        "100%25 sure",
        "-rf",
        "from the side",
    } <= paths


async def test_a_consumer_rebuilds_the_files_whatever_happens_on_the_way(
    history: History, database: str, consumer_database: str, broker: str, rabbitmq: RabbitMQ
) -> None:
    """Relay is killed twice, all lines are cut, the broker closes all connections, events are swapped and doubled.

    The first event of the path with the longest story comes last of all, so that all that follows it there is early.
    """
    stories = history.stories
    total = sum(map(len, stories.values()))
    longest = max(stories, key=lambda path: len(stories[path]))
    vhost = unquote(urlsplit(broker).path[1:])
    async with wire(broker) as line:
        consumer = settings_for(consumer_database, line.url, inbox__bindings=UNBOUND, daemon__log_level="error")
        producer = settings_for(
            database,
            line.url,
            source="git",
            outbox__page_rows=50,
            outbox__checkpoint_interval_s=60,  # so that after a kill much is published again
            outbox__standby_interval_s=0.1,
            daemon__log_level="error",
        )
        await prepare(consumer_database)
        async with (
            consuming(git_files.inbox, consumer) as consumers,
            crooked_way(consumer.rabbitmq, "files", last=(longest, 1)) as way,
        ):
            first, second, third = thirds(history.commits)
            relay = await RelayProcess.start(producer)
            await emit_commits(database, first)
            await way.until(lambda way: len(way.seen) > 0 or not any(c.events for c in first))
            await relay.kill()

            relay = await RelayProcess.start(producer)
            line.cut()
            before = len(way.seen)
            await emit_commits(database, second)
            await way.until(lambda way: len(way.seen) > before or not any(c.events for c in second))
            line.cut()
            await relay.kill()

            relay = await RelayProcess.start(producer)
            await asyncio.gather(
                emit_commits(database, third),
                asyncio.to_thread(rabbitmq.close_all_connections, vhost=vhost),
            )
            await way.until(lambda way: len(way.seen) == total)
            if len(stories[longest]) > 1:
                await consumers.until(lambda s: s.early > 0)
            way.let_last_go()
            await consumers.until(lambda s: s.applied == total and s.duplicates > 0)
            await relay.terminate()
    await require_the_files_and_their_stories(consumer_database, history)


async def test_json_lines_through_the_programs_lead_to_the_same_files(
    history: History, database: str, consumer_database: str, broker: str
) -> None:
    """`python -m tests.acceptance.git_history | relay emit -`, as the README has it."""
    producer = settings_for(database, broker, source="git")
    await prepare(consumer_database)
    async with consuming(git_files.inbox, settings_for(consumer_database, broker)) as consumers:
        emitted = await asyncio.to_thread(pipe_into_relay_emit, history, producer)
        assert emitted > 0
        await Outbox(producer).run(drain=True)
        await consumers.until(lambda s: s.applied == emitted)
    await require_the_files_and_their_stories(consumer_database, history)


def pipe_into_relay_emit(history: History, settings: Settings) -> int:
    """How many events it says it has committed."""
    environment = os.environ | {"RELAY_POSTGRES_DSN": settings.postgres.dsn.get_secret_value()}
    history_command = [sys.executable, "-m", "tests.acceptance.git_history", str(history.repository), history.head]
    emit_command = [sys.executable, "-m", "relay", "emit", "--batch", "100", "-"]
    with subprocess.Popen(history_command, cwd=PROJECT, stdout=subprocess.PIPE) as lines:
        emitted = subprocess.run(
            emit_command, cwd=PROJECT, stdin=lines.stdout, env=environment, capture_output=True, text=True, check=True
        )
    assert lines.returncode == 0
    count, _, rest = emitted.stdout.partition(" ")
    assert rest == "events committed\n"
    return int(count)


async def prepare(consumer_database: str) -> None:
    async with connected(consumer_database) as db:
        await db.execute(git_files.TABLES)


async def emit_commits(dsn: str, several: Sequence[Commit]) -> None:
    """Each commit's events in one transaction."""
    async with connected(dsn) as db:
        for commit in several:
            async with db.transaction():
                await emit_many(db, commit.events)


async def require_the_files_and_their_stories(consumer_database: str, history: History) -> None:
    """The files are those of the repository, each event was applied once and in its path's order, nothing is left over."""
    async with connected(consumer_database) as db:
        files = {r["path"]: r["content"] for r in await db.fetch("SELECT * FROM file")}
        rows = await db.fetch("SELECT path, seq, event_type, commit_id FROM story ORDER BY at")
        left = await db.fetchval("SELECT count(*) FROM relay.inbox_held") + await db.fetchval(
            "SELECT count(*) FROM relay.inbox_quarantine"
        )
    stories: dict[str, list[tuple[int, str, str]]] = defaultdict(list)
    for r in rows:
        stories[r["path"]].append((r["seq"], r["event_type"], r["commit_id"]))
    assert files == history.files
    assert dict(stories) == history.stories
    assert left == 0


def thirds(several: Sequence[Commit]) -> tuple[Sequence[Commit], Sequence[Commit], Sequence[Commit]]:
    """The last third is not empty if there is a commit at all."""
    one, two = len(several) // 3, 2 * len(several) // 3
    return several[:one], several[one:two], several[two:]
