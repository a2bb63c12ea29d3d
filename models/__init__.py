"""The transformer, the image tokenizer, and their weights."""

import util as util  # before torch: see there
