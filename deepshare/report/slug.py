"""Names as ids of a page and as file names."""

import re
from collections.abc import Iterable


def slugs(texts: Iterable[str]) -> list[str]:
    """One for each text, all different: small letters, digits, - and . alone; a number where two would be alike."""
    found: dict[str, None] = {}
    for text in texts:
        plain = re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
        one, count = plain, 1
        while one in found:
            count += 1
            one = f"{plain}-{count}"
        found[one] = None
    return list(found)
