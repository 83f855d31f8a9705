"""Customisations as data: concepts, Infusion, ICO, DCI."""
