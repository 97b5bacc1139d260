"""Steps, the runner that drives them, and one file per outside system."""
