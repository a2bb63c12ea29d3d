"""What the programs share that is not the model: flags, processes, images, the token cache, logs, pictures."""
