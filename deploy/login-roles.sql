-- The logins of compose.yaml, each granted one of the roles that `relay migrate` makes. For psql; safe to run again.
-- $SECRETS is the folder with the files relay_password and inbox_password.
\set ON_ERROR_STOP on
\set relay_password `cat "$SECRETS/relay_password"`
\set inbox_password `cat "$SECRETS/inbox_password"`

SELECT format('CREATE ROLE %I LOGIN', name)
FROM unnest(ARRAY['shop_relay', 'billing_inbox']) AS name
WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = name)
\gexec

ALTER ROLE shop_relay PASSWORD :'relay_password';
ALTER ROLE billing_inbox PASSWORD :'inbox_password';

GRANT relay_daemon TO shop_relay;
GRANT relay_consumer TO billing_inbox;
