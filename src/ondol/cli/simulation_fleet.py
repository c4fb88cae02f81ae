"""The fleet of `ondol simulate`: a folder of documents or one site's file, with `simulation.toml` beside them."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Final

from ondol import config as configuration
from ondol.adapters.power import cpu_power, grids
from ondol.adapters.pricebook import prices_of
from ondol.config.files import read_text
from ondol.config.fleet import as_data, check_fleet, load_fleet
from ondol.core.fleet import Fleet
from ondol.errors import ConfigError
from ondol.simulate.fleet import FleetModel, Known, Setting, model_of, setting_of

SETTING_NAME: Final = "simulation.toml"


def fleet_model(path: Path) -> FleetModel:
    """The model of the fleet at `path`.

    Raises:
        ConfigError: the documents or the setting are wrong, or there are none.
    """
    if not path.exists():
        raise ConfigError(
            f"{path}: found nothing; expected a folder with the documents of a fleet, or a site's file"
        )
    fleet, known = _of_folder(path) if path.is_dir() else _of_file(path)
    return model_of(fleet, known, _setting(path if path.is_dir() else path.parent))


def _setting(folder: Path) -> Setting:
    file = folder / SETTING_NAME
    if not file.exists():
        return Setting()
    try:
        return setting_of(tomllib.loads(read_text(file)), where=str(file))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: {error}") from error


def _of_folder(path: Path) -> tuple[Fleet, Known]:
    fleet = check_fleet(as_data(load_fleet(path)), {})
    rated = [one for one in fleet.prices.values() if one.exchange_from is None]
    exchange = {
        (one.exchange_from, one.currency): one.rate
        for one in fleet.prices.values()
        if one.exchange_from is not None and one.rate is not None
    }
    return fleet, Known(
        prices=prices_of(rated), exchange=exchange, grids=_grids(fleet),
        cpus={name: cpu_power(site.power) for name, site in fleet.sites.items() if site.power is not None},
    )  # fmt: skip


def _of_file(path: Path) -> tuple[Fleet, Known]:
    found = configuration.load(path)
    fleet = Fleet(
        sites=found.sites, models=found.models, deployments=found.deployments, routes=found.routes,
        budgets=found.budgets,
    )  # fmt: skip
    return fleet, Known(
        prices=found.prices, exchange=found.exchange, grids=_grids(fleet),
        cpus={name: cpu_power(site.power) for name, site in fleet.sites.items() if site.power is not None},
    )  # fmt: skip


def _grids(fleet: Fleet) -> dict[str, float]:
    zones = sorted({site.grid_zone for site in fleet.sites.values()})
    return {zone: grid.grams_per_kwh for zone, grid in grids(zones).items()}
