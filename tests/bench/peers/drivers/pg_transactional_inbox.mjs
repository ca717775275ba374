// pg-transactional-outbox's inbox, as its README and examples say. Copied into the folder of its packages and run there.
//
// Its own guarantees: a message is stored once (its id is the table's key), and handled in a transaction of its own that also marks it as
// processed: exactly once; several at once without order; abandoned after five attempts. Fast as far as its interface allows:
// deliveries are stored many to a transaction and acknowledged at once.
import amqp from 'amqplib';
import { listen, pool, prepare, storage } from './pg_transactional_shared.mjs';

const STORED_AT_ONCE = 100;
const EFFECT = 'INSERT INTO effect (aggregate, seq) VALUES ($1, $2)';

const [verb, kind] = process.argv.slice(2);

const received = (delivery) => {
  const payload = JSON.parse(delivery.content.toString());
  return {
    id: delivery.properties.messageId,
    aggregateType: 'bench',
    aggregateId: payload.aggregate,
    messageType: delivery.properties.type,
    segment: payload.aggregate,
    concurrency: 'parallel',
    payload,
    createdAt: new Date().toISOString(),
  };
};

if (verb === 'prepare') {
  await prepare('inbox', kind);
} else {
  const database = pool();
  const store = storage('inbox');
  const shutdown = listen('inbox', kind, (message, client) =>
    client.query(EFFECT, [message.payload.aggregate, message.payload.seq]),
  );
  const broker = await amqp.connect(process.env.PEER_URL);
  const channel = await broker.createChannel();
  await channel.prefetch(10 * STORED_AT_ONCE);

  const waiting = [];
  let storing = false;
  const storeAll = async () => {
    storing = true;
    while (waiting.length > 0) {
      const batch = waiting.splice(0, STORED_AT_ONCE);
      const client = await database.connect();
      await client.query('BEGIN');
      // Sent together, answered in turn: the client keeps the order of its queries.
      await Promise.all(batch.map((delivery) => store(received(delivery), client)));
      await client.query('COMMIT');
      client.release();
      channel.ack(batch.at(-1), true);
    }
    storing = false;
  };
  await channel.consume(process.env.PEER_QUEUE, (delivery) => {
    waiting.push(delivery);
    if (!storing) void storeAll();
  });
  process.on('SIGTERM', async () => {
    await broker.close();
    await shutdown();
    await database.end();
    process.exit(0);
  });
}
