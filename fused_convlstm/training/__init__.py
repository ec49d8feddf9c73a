"""Training: recipes, tasks, the training loop. Needs ``fused-convlstm[train]``."""

from .processes import Processes
from .recipe import Recipe, load_recipe, recipe_names
from .trainer import Trainer

__all__ = ["Processes", "Recipe", "Trainer", "load_recipe", "recipe_names"]
