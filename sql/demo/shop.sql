-- The shop of `relay demo`: the producer's own tables, in the database `shop`, beside relay.outbox.

-- name: shop_tables
CREATE SCHEMA shop;
CREATE TABLE shop.orders (
  order_id     bigint PRIMARY KEY,
  amount_cents bigint NOT NULL CHECK (amount_cents > 0),
  state        text   NOT NULL CHECK (state IN ('created', 'paid', 'shipped', 'cancelled')),
  paid_cents   bigint NOT NULL DEFAULT 0
);
-- What really happened to each order, in order: the truth that every consumer is compared with.
CREATE TABLE shop.journal (
  order_id   bigint NOT NULL REFERENCES shop.orders,
  step       bigint NOT NULL,
  event_type text   NOT NULL,
  token      text   NOT NULL UNIQUE,
  PRIMARY KEY (order_id, step)
);

-- name: place_order
-- $1 order, $2 amount (cents), $3 token
WITH placed AS (INSERT INTO shop.orders (order_id, amount_cents, state) VALUES ($1, $2, 'created') RETURNING order_id)
INSERT INTO shop.journal (order_id, step, event_type, token) SELECT order_id, 1, 'OrderCreated', $3 FROM placed

-- name: change_order
-- $1 order, $2 its new state, $3 paid so far (cents), $4 step, $5 event type, $6 token
WITH changed AS (UPDATE shop.orders SET state = $2, paid_cents = $3 WHERE order_id = $1 RETURNING order_id)
INSERT INTO shop.journal (order_id, step, event_type, token) SELECT order_id, $4, $5, $6 FROM changed

-- name: shop_journal
SELECT order_id, step, event_type, token FROM shop.journal ORDER BY order_id, step

-- name: shop_orders
SELECT order_id, state, paid_cents FROM shop.orders

-- name: owner_of_log
-- host:pid of the relay that owns the log, null before the first
SELECT owner FROM relay.outbox_cursor WHERE shard = 0
