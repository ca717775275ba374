-- Billing of `relay demo`: the consumer's own tables. The same in every consumer's database, and none of its constraints
-- would stop a mistake: what an event does twice or too early stays visible.

-- name: billing_tables
CREATE SCHEMA billing;
CREATE TABLE billing.orders (
  order_id bigint PRIMARY KEY,
  state    text   NOT NULL
);
CREATE TABLE billing.invoices (
  invoice_id   bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  order_id     bigint NOT NULL,
  amount_cents bigint NOT NULL  -- negative: a credit note
);
CREATE TABLE billing.balance (cents bigint NOT NULL);
INSERT INTO billing.balance VALUES (0);
-- One row each time an event was applied, in the order in which it was.
CREATE TABLE billing.effects (
  effect_id  bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  order_id   bigint NOT NULL,
  step       bigint NOT NULL,
  event_type text   NOT NULL,
  token      text   NOT NULL
);

-- name: set_order_state
-- $1 order, $2 state, $3 step, $4 event type, $5 token
-- The effect is written after the order's row is locked, so that of one order, order of effect_id = order of application.
WITH booked AS (
  INSERT INTO billing.orders (order_id, state) VALUES ($1, $2)
  ON CONFLICT (order_id) DO UPDATE SET state = excluded.state
  RETURNING order_id
)
INSERT INTO billing.effects (order_id, step, event_type, token) SELECT order_id, $3, $4, $5 FROM booked

-- name: issue_invoice
-- $1 order, $2 amount (cents; negative: a credit note)
WITH issued AS (INSERT INTO billing.invoices (order_id, amount_cents) VALUES ($1, $2) RETURNING amount_cents)
UPDATE billing.balance SET cents = cents + (SELECT amount_cents FROM issued)

-- name: count_effects
SELECT count(*) AS applied, count(DISTINCT token) AS events FROM billing.effects

-- name: billing_effects
SELECT order_id, step, event_type, token FROM billing.effects ORDER BY effect_id

-- name: billing_orders
SELECT order_id, state FROM billing.orders

-- name: billing_invoices
SELECT order_id, sum(amount_cents)::bigint AS cents FROM billing.invoices GROUP BY order_id

-- name: billing_balance
SELECT cents FROM billing.balance

-- name: inbox_leftovers
-- What the inbox still holds or has put aside: nothing, at the end
SELECT (SELECT count(*) FROM relay.inbox_held) + (SELECT count(*) FROM relay.inbox_quarantine) AS messages
