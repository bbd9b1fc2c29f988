"""What an exchange will cost on this network and machine, and which one ``exchange="auto"`` takes."""
