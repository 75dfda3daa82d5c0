"""Training data: one Record for every format, files read by random access, and the Grain pipeline of packed rows."""
