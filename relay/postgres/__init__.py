"""The database's adapter: connections, migrations, named queries."""
