"""The nouns: frozen data that every room reads. Nothing here decides or runs anything."""
