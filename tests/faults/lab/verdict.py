"""What the checker concludes, as plain values, and the limits it concludes with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["passed", "failed", "inconclusive"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One claim, and how often it was found to be wrong."""

    name: str
    claim: str  # what holds if count is 0
    examined: int  # things looked at; 0: there was nothing to look at, so the claim is not shown
    count: int
    examples: tuple[str, ...] = ()  # the first ones, in words


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """How long it took after one fault until everything was applied that had been committed before it was healed."""

    kind: str
    begun: float
    healed: float
    seconds: float  # from the heal; of faults that overlap, from the last heal
    bound_s: float  # of faults that overlap, the longest of theirs
    own_bound_s: float
    alone: bool  # False: other faults overlapped, so it may be theirs


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What the run amounted to. Nothing here is right or wrong."""

    events: int
    undone: int  # events whose transaction was rolled back
    transactions: int  # committed ones, as far as the producers know
    effects: int
    disturbances: int  # times that something was wrong: a fault, or several that followed closely
    alone: int  # faults that no other overlapped, not even in its recovery
    copies: int  # messages at the broker beyond the first of each event: duplicates that the inbox had to drop
    out_of_turn: int  # events first published after a later one of their aggregate (see DESIGN G3)
    load_s: float
    settle_s: float | None  # from the end of the load until everything was applied
    events_per_s: float
    quiet_p50_s: float | None  # latency, commit to effect, while no fault was on; None: it never was quiet
    quiet_p99_s: float | None
    longest_s: float | None  # the longest latency of all
    struck: int  # faults
    kinds: int  # kinds of fault that have bitten
    worst_recovery_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """`failed` if anything is wrong; else `inconclusive` if anything is in doubt; else `passed`."""

    outcome: Outcome
    checks: tuple[Check, ...]  # all of them
    doubts: tuple[Check, ...]  # all of them: whether the run could have shown anything
    recoveries: tuple[Recovery, ...]  # one for each fault that was struck
    figures: Figures

    @property
    def findings(self) -> tuple[Check, ...]:
        """What is wrong, and what is in doubt."""
        return tuple(check for check in (*self.checks, *self.doubts) if check.count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """How much of one resource a daemon may use."""

    growth: int  # the last quarter of its life (minimum) over the first (maximum): more is a leak
    most: int  # at any time


MB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What is still all right."""

    recovery_s: float = 15.0  # of a kind of fault that names none
    quiet_wait_s: float = 5.0  # that an event may wait while no fault is on or being recovered from
    calm_s: float = 1.0  # latency at which a fault counts as recovered from
    margin_s: float = 2.0  # this close to a disturbance, latencies are nobody's proof
    fair_factor: float = 2.0  # p99 of the others during a confined fault, over that of quiet times
    fair_s: float = 1.0  # and in any case allowed
    fair_wait_s: float = 3.0  # that one event of the others may wait; twice the longest of quiet times, up to quiet_wait_s, is allowed too
    fair_events: int = 100  # fewer prove nothing
    failed_share: float = (
        0.05  # of the producers' transactions: so many are explained by the faults that hit the producers
    )
    lifetime_s: float = 60.0  # of a process, before its growth is judged by itself
    short_life_s: float = 20.0  # the growth of those that lived so long is judged together
    warm_up_s: float = 6.0  # of each of those
    descriptors: Allowance = Allowance(growth=16, most=256)
    connections: Allowance = Allowance(growth=8, most=64)
    # A standby has 4, an idle owner 22; each message in flight is one.
    tasks: Allowance = Allowance(growth=30, most=1000)
    rss: Allowance = Allowance(growth=64 * MB, most=512 * MB)
