"""What this version does on this machine: insert, drain, apply, and the way of one event through all of it."""
