"""A deterministic simulation: the real cores of relay against models of PostgreSQL and RabbitMQ, in virtual time, from a seed.

    clock.py              an event loop without a clock and without sockets: time is what the next timer says
    violation.py          what is raised when a promise is broken
    server.py             what both databases have in common: transactions, row locks, session locks, NOTIFY
    silence.py            a log that costs nothing
    connection.py         what relay sees of PostgreSQL: asyncpg's interface, latencies, broken connections
    outbox_database.py    the producer's database: transactions, snapshots, counters, advisory locks, the cursor
    outbox_parked.py      its parked rows
    publisher.py          the broker as the outbox sees it: confirms, nacks, returns, lost sessions
    outbox_world.py       relays and producers in one world, and what must hold in it at every step
    inbox_database.py     the consumer's database: row locks, what is not committed yet, cursors, held messages, effects
    inbox_queue.py        the broker as the inbox sees it: prefetch, redelivery in any order
    inbox_world.py        consumers in one world, and what must hold in it at every step
    outbox_schedules.py   a random schedule of the outbox, from a seed
    inbox_schedules.py    a random schedule of the inbox, from a seed
    explorer.py           thousands of them
    mutants.py            relay, broken on purpose

Nothing of the product is replaced but its connections: the sessions, the supervisor, the pipeline, the statements' callers and
their order are the real ones. The models answer relay's named statements, as DESIGN.md describes what they do;
tests/faults/test_simulation_models.py compares them with what PostgreSQL answers.
"""
