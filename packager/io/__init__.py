"""Files, byte ranges and plain records: what reads and writes on behalf of everybody."""
