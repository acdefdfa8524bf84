"""Which route `linear` took for each weight shape: the run's record."""

ROUTES: dict[str, str] = {}
