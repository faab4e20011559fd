"""The command line: arguments in; text, JSON and pictures out. It decides nothing."""
