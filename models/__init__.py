"""The transformer, the image tokenizer, and their weights."""

import util as util  # before torch: it looks for the working directory
