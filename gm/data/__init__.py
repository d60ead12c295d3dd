"""Pictures of a concept, from a folder to an endless stream of noisy-latent ingredients.

`images` reads and crops, `latents` keeps the VAE's moments, `batches` draws training samples.
"""
