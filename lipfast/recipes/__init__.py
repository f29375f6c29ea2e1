"""One file per paper: data, model, schedule, loss and optimiser as a dataclass. None has a loop of its own."""

from lipfast.recipes.crm import Crm
from lipfast.recipes.gloro import Gloro
from lipfast.recipes.graft import Graft
from lipfast.recipes.interval import Interval
from lipfast.recipes.lipnext import Lipnext
from lipfast.recipes.local import Local
from lipfast.recipes.recipe import Recipe

RECIPES: dict[str, type[Recipe]] = {
    "interval": Interval,
    "gloro": Gloro,
    "local": Local,
    "crm": Crm,
    "lipnext": Lipnext,
    "graft": Graft,
}


def find(name: str, data: str) -> Recipe:
    """The recipe's preset for a data set. Raises: ValueError, with the names there are."""
    if name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {name!r}")
    return RECIPES[name].preset(data)


__all__ = ["RECIPES", "Crm", "Gloro", "Graft", "Interval", "Lipnext", "Local", "Recipe", "find"]
