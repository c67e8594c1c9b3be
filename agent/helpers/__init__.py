"""Programs that VM units run without the agent; standard library only."""
