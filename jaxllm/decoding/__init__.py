"""Key/value cache, sampling, guidance and the jitted decode loop."""
