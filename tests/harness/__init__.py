"""What integration and fault tests share: an audit queue, hostile producers, the daemon as an object and as a process."""
