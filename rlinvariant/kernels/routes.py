"""Record which route `linear` took for each weight shape, and which attention each form of a layer."""

from collections.abc import Mapping

ROUTES: dict[str, str] = {}
ATTENTION_ROUTES: dict[str, str] = {}


def in_words(routes: Mapping[str, str], format: str, between: str) -> str:
    """Say for each route what took it, all in order.

    Args:
        routes: what took a route -> the route.
        format: `{route} for {them}`, say.
        between: what stands between two of them.
    """
    by_route: dict[str, list[str]] = {}
    for what, route in sorted(routes.items()):
        by_route.setdefault(route, []).append(what)
    said = (format.format(route=route, them=between.join(them)) for route, them in by_route.items())
    return "; ".join(said) or "none so far"


def attention_routes() -> str:
    """Say which attention took which heads, windows and caps so far."""
    return in_words(ATTENTION_ROUTES, "{route}, for {them}", " and ")
