"""What the strategy `auto` is made of: what can stream, who does, through which bytes, by which copies, how fast."""
