"""Frozen data that every other room reads. This room decides nothing and runs nothing."""
