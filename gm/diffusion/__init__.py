"""Diffusion on the host: numpy throughout, only the network that is passed in runs on a device.

Latents are in variance-exploding form, z = z0 + sigma * eps with eps ~ N(0, 1), and a network is one
denoiser D(z, sigma), the best guess of z0 (Karras et al. 2022, "Elucidating the Design Space of
Diffusion-Based Generative Models", below EDM). Class and parameter names are those of Stability's
`sgm.modules.diffusionmodules`, because YAML files name them.
"""
