"""Record which route `linear` took for each weight shape, and which attention each form of a layer."""

ROUTES: dict[str, str] = {}
ATTENTION_ROUTES: dict[str, str] = {}
