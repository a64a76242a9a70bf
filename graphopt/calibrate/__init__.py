"""What a model sees: samples, statistics of the values inside it, and ranges to quantise them in."""
