"""The networks: UNet, VAE, their layers and configurations."""
