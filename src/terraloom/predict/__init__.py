"""Prediction: tiles with exact halos, mosaics, products."""
