// pg-transactional-outbox's outbox, as its README and examples say. Copied into the folder of its packages and run there.
//
// Its own guarantees: at least once; with the replication listener's default mutex messages are sent one after the other, with a
// semaphore (used here, it is faster) several at once, without order. Each message is a transaction of its own: lock the row, call the
// handler, mark it as processed. The handler waits for the broker's confirm; a returned message is an error.
import amqp from 'amqplib';
import { listen, prepare } from './pg_transactional_shared.mjs';

const [verb, kind] = process.argv.slice(2);

if (verb === 'prepare') {
  await prepare('outbox', kind);
} else {
  const broker = await amqp.connect(process.env.PEER_URL);
  const channel = await broker.createConfirmChannel();
  const returned = new Set();
  channel.on('return', (message) => returned.add(message.properties.messageId));

  const publish = (message) =>
    new Promise((resolve, reject) => {
      const options = {
        persistent: true,
        mandatory: true,
        contentType: 'application/json',
        messageId: message.id,
        headers: { 'x-aggregate-type': message.aggregateType, 'x-aggregate-id': message.aggregateId },
      };
      const key = `${message.aggregateType}.${message.messageType}`;
      channel.publish(process.env.PEER_EXCHANGE, key, Buffer.from(JSON.stringify(message.payload)), options, (error) => {
        if (error) reject(error);
        else if (returned.delete(message.id)) reject(new Error('no queue is bound'));
        else resolve();
      });
    });

  const shutdown = listen('outbox', kind, publish);
  process.on('SIGTERM', async () => {
    await shutdown();
    await broker.close();
    process.exit(0);
  });
}
