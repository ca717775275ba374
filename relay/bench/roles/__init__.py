"""What a child process does, by name; see relay.bench.children."""
