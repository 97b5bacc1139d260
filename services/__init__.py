"""Long-running processes and commands: parse settings, build a step, run it."""
