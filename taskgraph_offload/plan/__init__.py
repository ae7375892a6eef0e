"""The plan and its passes: edges, seats' arithmetic, prediction, proof, explanation, text and file form."""
