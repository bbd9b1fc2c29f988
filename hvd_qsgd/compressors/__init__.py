"""What the compressors of all frameworks share: settings, defaults, state, and a class for each codec."""
