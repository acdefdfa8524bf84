"""Record which route `linear` took for each weight shape, and which attention each form of a layer."""

ROUTES: dict[str, str] = {}
ATTENTION_ROUTES: dict[str, str] = {}


def attention_routes() -> str:
    """Say which attention took which heads, windows and caps so far."""
    by_route: dict[str, list[str]] = {}
    for form, route in sorted(ATTENTION_ROUTES.items()):
        by_route.setdefault(route, []).append(form)
    return "; ".join(f"{route}, for {' and '.join(forms)}" for route, forms in by_route.items()) or "none so far"
