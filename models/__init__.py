"""The transformer (`lpd`) and the image tokenizer (`vqgan`), with the parts they are made of."""
