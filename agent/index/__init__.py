"""What the agent knows, kept in memory and in SQLite."""
