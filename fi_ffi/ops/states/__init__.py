"""Ops that update a state for each sequence: GDN, KDA, Mamba."""
