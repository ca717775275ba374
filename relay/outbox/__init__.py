"""The producer's side, in the order a row meets it: cursor, reader, routing, publisher (relay.rabbitmq), parking, store, shard."""
