"""Whether cells of the embedded models come out the same whatever a CPU and its libraries do.

`make verify-portable` computes cells in processes that differ in instruction set and threads, and
compares every tensor of the packed models to the bit and every answer word for word. `worker` is
what one of these processes does, `settings` says how they differ and compares them, and `__main__`
is the command. Nothing is recorded.
"""
