"""Who starts the ranks. Strategies do not know which one did."""
