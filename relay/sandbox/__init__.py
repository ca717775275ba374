"""Throwaway PostgreSQL and RabbitMQ servers for the demo, the tests and the benchmarks: real ones, never mocks.

`find_postgres()` and `find_rabbitmq()` give the servers that RELAY_TEST_POSTGRES_DSN and RELAY_TEST_RABBITMQ_URL name,
else private ones: loopback only, random ports and passwords, in a temporary folder. A private server ends with the
process that started it, whichever way that one ends (see `keeper.py`). A server that we did not start is never stopped.
"""

from relay.sandbox.install import Missing, missing
from relay.sandbox.management import ManagementApi
from relay.sandbox.postgres import ExternalPostgres, Postgres, SandboxPostgres, find_postgres
from relay.sandbox.rabbitmq import ExternalRabbitMQ, RabbitMQ, SandboxRabbitMQ, find_rabbitmq

__all__ = [
    "ExternalPostgres",
    "ExternalRabbitMQ",
    "ManagementApi",
    "Missing",
    "Postgres",
    "RabbitMQ",
    "SandboxPostgres",
    "SandboxRabbitMQ",
    "find_postgres",
    "find_rabbitmq",
    "missing",
]
