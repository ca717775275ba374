"""The broker's adapter: sessions, topology, and the two seams (publisher, consumer) that the lanes implement."""
