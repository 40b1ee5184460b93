"""Towers: the dense modules above the tables, on packed events (`x_TD` with the groups of like length)."""
