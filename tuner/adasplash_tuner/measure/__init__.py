"""What a config costs: compiling it, running it against a clock, and what the samples say."""
