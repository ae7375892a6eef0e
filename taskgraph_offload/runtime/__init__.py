"""The parts of the executor: what happens at a boundary, who sits where, what is under way, what was measured."""
