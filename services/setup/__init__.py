"""From a clone to an environment that works, and what is wrong with a machine. Standard library only."""
