"""Which implementation of each operation serves on a card: proven and timed there, in another process, and kept."""
