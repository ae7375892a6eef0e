"""The parts of the verifier. They share no code with what they check."""
