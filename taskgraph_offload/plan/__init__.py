"""A plan holds what was decided; this room derives its edges, predicts, proves, explains, prints and saves it."""
