"""What the programs share: flags, processes, images, the token cache, logs, pictures."""
