"""Purging: rows leave everything that a run holds of them; `purge.purge` is the door."""
