"""From a checked request to latents and pixels: schedules, samplers, rows, the loop."""
