"""Real datasets: their class lists, and readers for the files as they are distributed."""
