"""One gradient from begin to finish: fusion buffers, exchanges under way, what is remembered; knows no framework."""
