"""Compression of module names to `ParameterGrid`s, for the records.

FlashInfer makes its modules in loops over parameters, so hundreds of names are a few products.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from fi_ffi.catalogue.ahead_of_time import ParameterGrid
from fi_ffi.loader.uris import Value
from fi_ffi.module_names import ModuleName, parse, uri


def write(grid: ParameterGrid) -> dict[str, object]:
    """Return the JSON that `ParameterGrid.read` reads."""
    params = {name: [*values] for name, values in grid.values}
    return {"family": grid.family} | ({"params": params} if params else {})


def names(grid: ParameterGrid, release: str) -> list[str]:
    """Return the names of a grid's modules in a release."""
    keys = [name for name, _ in grid.values]
    found = itertools.product(*(values for _, values in grid.values))
    return [uri(grid.family, release=release, **dict(zip(keys, one, strict=True))) for one in found]


def grids_of(given: Iterable[str], release: str) -> list[ParameterGrid]:
    """Return the grids that cover the names; names without a rule in the release are left out."""
    modules = [found for name in sorted(given) if (found := parse(name, release))]
    by_family: dict[str, list[ModuleName]] = {}
    for module in modules:
        by_family.setdefault(module.family, []).append(module)
    grids: list[ParameterGrid] = []
    for family, members in by_family.items():
        made = _merged([{k: (v,) for k, v in module.params.items()} for module in members])
        filled = [ParameterGrid(family, tuple(params.items())) for params in made]
        names_again = sorted(name for grid in filled for name in names(grid, release))
        assert names_again == [module.name for module in members], family
        grids += filled
    return grids


_Params = dict[str, tuple[Value, ...]]


def _merged(points: list[_Params]) -> list[_Params]:
    """Merge points that agree in all parameters but one, for every parameter in turn."""
    for name in points[0]:
        groups: dict[tuple[object, ...], _Params] = {}
        for params in points:
            key = tuple((k, _typed(v)) for k, v in params.items() if k != name)
            group = groups.setdefault(key, {**params, name: ()})
            group[name] = (*group[name], *params[name])
        points = [{**params, name: _sorted(params[name])} for params in groups.values()]
    return points


def _typed(values: tuple[Value, ...]) -> tuple[tuple[str, Value], ...]:
    # by type too: 1 and True are equal
    return tuple((type(value).__name__, value) for value in values)


def _sorted(values: tuple[Value, ...]) -> tuple[Value, ...]:
    return tuple(sorted(dict.fromkeys(values), key=lambda value: (type(value).__name__, value)))
