"""What `benchmarks/race.py` races: models, racers, one race in one process, and how the results are shown."""
