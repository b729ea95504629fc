"""Ops: a table of rows, and the functions made from it."""
