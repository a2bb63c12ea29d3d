"""The ground floor: flags, processes, devices, files, images, the token cache, pictures, logs."""
