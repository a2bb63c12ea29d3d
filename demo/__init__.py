"""The page and the notebook: they call `engine`, nothing calls them."""
