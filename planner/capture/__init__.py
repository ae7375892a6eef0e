"""What `capture` is made of: one run of a forward on tensors without data, and a record of all that it did."""
