"""Training of concepts; UNet and VAE weights never change."""
