"""Transactional outbox and ordered inbox: committed rows arrive at their handler once, in order."""
