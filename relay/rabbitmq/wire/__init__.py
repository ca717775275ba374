"""AMQP 0-9-1 as bytes: what goes over the wire, told apart and put together. Pure: no asyncio, no I/O."""
