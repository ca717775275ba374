#!/bin/sh
# Writes random passwords, and the addresses made of them, for compose.yaml: sh deploy/secrets.sh [FOLDER]
# One file per secret, as RELAY_POSTGRES_DSN_FILE and RELAY_RABBITMQ_URL_FILE want them. Never overwrites anything.
set -eu

folder=${1:-$(dirname "$0")/secrets}
if [ -e "$folder" ]; then
  echo "$folder exists: delete it for new passwords (the servers' volumes keep the old ones)" >&2
  exit 1
fi

password() { od -An -v -tx1 -N24 /dev/urandom | tr -d ' \n'; }
secret() { printf '%s\n' "$2" > "$folder/$1"; }

# Nobody else may enter the folder. The files are readable by all because Compose mounts them as they are, one by one,
# into containers whose users have other numbers.
umask 022
mkdir -p "$(dirname "$folder")"
mkdir -m 700 "$folder"

postgres=$(password)
relay=$(password)
inbox=$(password)
relay_broker=$(password)
inbox_broker=$(password)

secret postgres_password "$postgres"
secret relay_password "$relay"
secret inbox_password "$inbox"
secret migrate_dsn "postgresql://postgres:$postgres@postgres:5432/shop"
secret relay_dsn "postgresql://shop_relay:$relay@postgres:5432/shop"
secret inbox_dsn "postgresql://billing_inbox:$inbox@postgres:5432/shop"
secret relay_url "amqp://relay:$relay_broker@rabbitmq:5672/"
secret inbox_url "amqp://billing:$inbox_broker@rabbitmq:5672/"

# The relay declares its exchanges and writes to them, reads what inboxes ask of it, and answers straight to their queues (amq.default).
# The inbox declares and reads its own queue and that one's dead letters, may bind the queue to the exchanges, and asks in relay.repair;
# it cannot publish events.
cat > "$folder/rabbitmq_definitions.json" <<DEFINITIONS
{
  "vhosts": [{"name": "/"}],
  "users": [
    {"name": "relay", "password": "$relay_broker", "tags": ""},
    {"name": "billing", "password": "$inbox_broker", "tags": ""}
  ],
  "permissions": [
    {"user": "relay", "vhost": "/",
     "configure": "^relay\\\\.(events(\\\\.marks)?|repair(\\\\.shop)?)\$",
     "write": "^(relay\\\\.(events(\\\\.marks)?|repair\\\\.shop)|amq\\\\.default)\$",
     "read": "^relay\\\\.repair(\\\\.shop)?\$"},
    {"user": "billing", "vhost": "/",
     "configure": "^(relay\\\\.(events(\\\\.marks)?|dead|repair)|billing(\\\\.dead)?)\$",
     "write": "^(relay\\\\.(dead|repair)|billing(\\\\.dead)?)\$",
     "read": "^(relay\\\\.(events(\\\\.marks)?|dead)|billing(\\\\.dead)?)\$"}
  ]
}
DEFINITIONS
