"""What a cell leaves behind: its record, the lock on it, where its numbers come from, W&B."""
