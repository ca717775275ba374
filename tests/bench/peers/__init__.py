"""relay beside what else one can install, or write oneself: see `__main__.py`."""
