"""What is known about the world: contracts, views, windows. Pure: no I/O, no clock."""
