#!/bin/sh
# Installs Debian's rabbitmq-server as root, without letting the package start its service: the sandbox starts its own
# broker; PgBouncer, for the tests of pooled connections; psql, for the test of a service that has nothing else; and libfaketime,
# for the faults of clocks.
# invoke-rc.d(8) asks /usr/sbin/policy-rc.d; exit code 101 means "do not". An existing policy is left alone.
set -eu

policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    trap 'exit 1' HUP INT TERM
    printf '#!/bin/sh\nexit 101\n' > "$policy"
    chmod 755 "$policy"
fi

export DEBIAN_FRONTEND=noninteractive
apt-get -o DPkg::Lock::Timeout=300 update
apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends rabbitmq-server pgbouncer postgresql-client faketime
