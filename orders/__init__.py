"""Group sizes and generation orders, and the files they are kept in."""
