"""Turns files into clean records: reading, rules for letters, tiles and six-frame translation."""
