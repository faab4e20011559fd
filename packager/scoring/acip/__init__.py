"""The published method, ACIP: gates and adapters trained, then ranked."""
