"""Record which route `linear` took for each weight shape."""

ROUTES: dict[str, str] = {}
