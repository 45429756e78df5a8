"""What each command does: it takes settings, calls a stage, and prints the result as a text or as JSON."""
