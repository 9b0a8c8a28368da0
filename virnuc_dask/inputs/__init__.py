"""From files to clean records: reading, letters, tiles, and the six frames."""
