"""Speed and memory against the stock implementation, bits checked first: `python -m rlinvariant.bench NAME`."""
