// What the drivers of pg-transactional-outbox share: its tables as the package itself makes them, its settings, its listeners.
import pg from 'pg';
import library from 'pg-transactional-outbox';

// Handled at once. Without this bound the replication listener starts every message of a backlog, and its bookkeeping sorts all that
// are started for each that ends.
const AT_ONCE = Number(process.env.PEER_WORKERS ?? 20);

const { DatabaseSetup } = library;
const connection = { connectionString: process.env.PEER_DSN, max: AT_ONCE + 5 };
const schema = 'public';

const setup = (box) => ({
  database: 'none',
  schema,
  table: box,
  listenerRole: 'postgres',
  handlerRole: 'postgres',
  outboxOrInbox: box,
  publication: `peers_${box}_pub`,
  replicationSlot: `peers_${box}_slot`,
  nextMessagesName: `next_${box}_messages`,
  nextMessagesSchema: schema,
});

/** The package's table, and what the kind of listener (replication or polling) needs. */
export const prepare = async (box, kind) => {
  const config = setup(box);
  const client = new pg.Client(connection);
  await client.connect();
  await client.query(DatabaseSetup.dropAndCreateTable(config));
  if (kind === 'replication') {
    await client.query(DatabaseSetup.setupReplicationCore(config));
    // Alone: a slot cannot be created in a transaction that has written.
    await client.query(`SELECT pg_create_logical_replication_slot('${config.replicationSlot}', 'pgoutput')`);
  } else {
    await client.query(DatabaseSetup.createPollingFunction(config));
    await client.query(DatabaseSetup.setupPollingIndexes(config));
  }
  await client.end();
};

/** Start the listener with one handler for all messages; the function that stops it. */
export const listen = (box, kind, handle) => {
  const config = {
    outboxOrInbox: box,
    dbListenerConfig: connection,
    settings: {
      ...settings(box),
      dbPublication: `peers_${box}_pub`,
      dbReplicationSlot: `peers_${box}_slot`,
      nextMessagesFunctionSchema: schema,
      nextMessagesFunctionName: `next_${box}_messages`,
      nextMessagesBatchSize: AT_ONCE,
      nextMessagesPollingIntervalInMs: 10,
    },
  };
  const logger = library.getDisabledLogger();
  const [shutdown] =
    kind === 'replication'
      ? library.initializeReplicationMessageListener(config, { handle }, logger, {
          concurrencyStrategy: library.createReplicationSemaphoreConcurrencyController(AT_ONCE),
        })
      : library.initializePollingMessageListener(config, { handle }, logger);
  return shutdown;
};

/** The package's function that writes a message into its table. */
export const storage = (box) =>
  library.initializeMessageStorage({ outboxOrInbox: box, settings: settings(box) }, library.getDisabledLogger());

/** A pool of the driver's own. */
export const pool = () => new pg.Pool(connection);

// Protection against poisonous messages costs a transaction more for each message: off for the outbox, as the package's own template
// has it, on for the inbox.
const settings = (box) => ({
  dbSchema: schema,
  dbTable: box,
  enableMaxAttemptsProtection: box === 'inbox',
  enablePoisonousMessageProtection: box === 'inbox',
  messageCleanupIntervalInMs: 0,
});
