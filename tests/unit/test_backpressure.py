"""Reading of a socket is held back by bytes: in time, for no longer than needed, and never so long that the broker ends the connection."""

from __future__ import annotations

import pytest

from relay.rabbitmq import backpressure
from relay.rabbitmq.backpressure import Backpressure
from tests.harness.loop_clock import loop_clock

BOUND = 1000
PIECE = 256 * 1024
MIB = 2**20


class Socket:
    """Is read, or is not; `resumed` counts how often it was begun again."""

    def __init__(self) -> None:
        self.is_read = True
        self.resumed = 0

    def pause(self) -> None:
        self.is_read = False

    def resume(self) -> None:
        self.is_read = True
        self.resumed += 1


@pytest.fixture
async def socket() -> Socket:
    return Socket()


@pytest.fixture
async def held(socket: Socket) -> Backpressure:
    return Backpressure(socket.pause, socket.resume, bound=BOUND)


def piece(held: Backpressure, *sizes: int, received: int = PIECE) -> None:
    """A piece of the stream, in which messages ended."""
    for size in sizes:
        held.hold(size, size)
    held.settle(received)


async def test_the_socket_is_read_up_to_the_bound_and_again_as_soon_as_enough_is_released(
    socket: Socket, held: Backpressure
) -> None:
    piece(held, 600, 400)
    assert (socket.is_read, socket.resumed) == (True, 0)
    piece(held, 1)
    assert (socket.is_read, held.is_holding_back) == (False, True)
    held.release(600)
    assert (socket.is_read, held.is_holding_back, held.held) == (True, False, 401)
    piece(held, 600)
    assert held.times == 2


async def test_what_does_not_suffice_is_waited_for(socket: Socket, held: Backpressure) -> None:
    piece(held, 900, 900)
    held.release(799)
    assert not socket.is_read
    held.release(1)
    assert socket.is_read


async def test_a_little_is_let_in_now_and_then(socket: Socket, held: Backpressure) -> None:
    """Else the broker ends the connection, and aiormq as well."""
    piece(held, 2000)
    with loop_clock() as clock:
        for _ in range(10):
            assert await clock.until(lambda: socket.is_read, at_most_s=20) <= 3
            piece(held)
            assert not socket.is_read


@pytest.mark.parametrize("received", [1000, PIECE], ids=["in crumbs", "in pieces"])
@pytest.mark.parametrize("largest", [BOUND + 1, 16 * MIB], ids=["small", "largest"])
async def test_it_adds_up_to_two_of_the_largest_messages_before_the_broker_gives_up_on_them_and_to_little_more(
    socket: Socket, held: Backpressure, received: int, largest: int
) -> None:
    """It waits 30 s for what it has written, by sockets that hold 4 MiB."""
    piece(held, largest)
    let_in = 0
    with loop_clock() as clock:
        ends = clock.time() + 20
        while clock.time() < ends:
            await clock.until(lambda: socket.is_read, at_most_s=30, step_s=0.25)
            while socket.is_read and let_in < 3 * largest + 5 * MIB:
                piece(held, received=received)
                let_in += received
    # A tenth less: on a busy machine a second that was put forward is a little more than one, and one of the twenty does not come.
    assert 0.9 * (2 * largest + 3.5 * MIB) < let_in < 2 * largest + 4.5 * MIB


async def test_after_the_overshoot_nothing_is_let_in(
    socket: Socket, held: Backpressure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backpressure, "OVERSHOOT_BYTES", 500)
    piece(held, 1500)
    with loop_clock() as clock:
        assert await clock.until(lambda: socket.is_read, at_most_s=20) < 20
        piece(held, 1)
        assert not socket.is_read
        await clock.forward(30)
        assert not socket.is_read
        held.release(2)
        await clock.until(lambda: socket.is_read, at_most_s=20)
        assert held.is_holding_back


async def test_what_resumes_the_socket_behind_its_back_lets_one_piece_in(socket: Socket, held: Backpressure) -> None:
    """asyncio's StreamReader does, when aiormq has taken what it has."""
    piece(held, 2000)
    socket.resume()
    piece(held)
    assert not socket.is_read


async def test_in_the_end_everything_is_read_whatever_is_held(socket: Socket, held: Backpressure) -> None:
    piece(held, 2000)
    held.end()
    piece(held, 5000)
    assert socket.is_read
    with loop_clock() as clock:
        await clock.forward(10)
    assert socket.resumed == 1
