"""A run: from a recipe or a call to its end, what it leaves on disk, and how it survives."""
