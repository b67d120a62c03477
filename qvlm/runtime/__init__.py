"""What runs a cell: several processes as one, stages with their time and memory."""
