"""Group sizes, generation orders, and order files."""
