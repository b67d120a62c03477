"""The cells of a sweep: in what order they run, and where."""
