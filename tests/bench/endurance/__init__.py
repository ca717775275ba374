"""Both relays, for minutes, while somebody forgets a transaction: see `__main__.py`."""
