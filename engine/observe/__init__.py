"""What a caller sees of a run: maps, masks, sheets, progress."""
