"""`relay demo`: a small shop on throwaway servers, faults on the way, and a verdict computed from the tables.

The files, in the order in which an event meets them:

    shop.py        concurrent producers: business tables and events in one transaction, some rolled back
    billing.py     what billing does with an event, and the Inbox whose handlers do it (run by worker.py, a process)
    naive.py       the same business code behind a textbook consumer
    nemesis.py     kills, restarts, duplicates, swaps
    audit.py       counts what really went through the broker
    verdict.py     who got what wrong, from the rows of all databases (pure)
    stage.py       servers, databases, queues, daemons: what must be there before the shop opens
    screen.py      what the terminal shows meanwhile
    conclusion.py  tables read, verdict printed, exit code chosen
    run.py         the wiring, top to bottom
"""
