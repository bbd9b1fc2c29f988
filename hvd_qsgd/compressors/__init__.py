"""What the compressors of all frameworks share: settings with their types and defaults, statistics, state."""
