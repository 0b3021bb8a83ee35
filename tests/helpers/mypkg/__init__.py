"""A package of a user's own, with a strategy in it."""
