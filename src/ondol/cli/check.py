"""`ondol config check`: would a gateway take this file?"""

from __future__ import annotations

from pathlib import Path

from ondol import config as configuration
from ondol.cli.installation import AsJson
from ondol.cli.output import print_json


def check(file: Path, /, *, as_json: AsJson = False) -> int:
    """Read and check a site's file, without starting anything.

    Args:
        file: The site's YAML file.
    """
    catalog = configuration.load(file)
    found = {
        "site": catalog.site.name,
        "routes": sorted(catalog.routes),
        "deployments": sorted(catalog.deployments),
        "models": sorted(catalog.models),
        "sites": sorted(catalog.sites),
    }
    if as_json:
        print_json({"file": str(file), "ok": True, **found})
        return 0
    routes = ", ".join(sorted(catalog.routes)) or "no route"
    print(f"{file} is good: site {catalog.site.name} serves {routes}")
    return 0
