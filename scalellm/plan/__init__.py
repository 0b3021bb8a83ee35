"""What fits and how fast, before money is spent: the memory and the time of a step."""
