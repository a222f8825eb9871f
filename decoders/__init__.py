"""Writing: diffusion decoders that turn conditions into media, and media into bytes."""
