"""Runs a plan on a model: moves weights, follows the model's forward, copies what each call needs, measures it all."""
