"""What the user asked: the recipe's schema, its loading with line numbers, and the shipped recipes."""

from quantcli.recipe.load import load_recipe, resolved_yaml
from quantcli.recipe.schema import Recipe, json_schema
from quantcli.recipe.shipped import copy_shipped, shipped_description, shipped_names, shipped_path

__all__ = [
    "Recipe",
    "copy_shipped",
    "json_schema",
    "load_recipe",
    "resolved_yaml",
    "shipped_description",
    "shipped_names",
    "shipped_path",
]
