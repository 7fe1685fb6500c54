"""What an engine asks of a guide, and guides that are ready-made."""
