"""What operators see and do, on both sides: called by the command line, and by whatever face comes later."""
